"""Names and arguments in the deployment files."""

from __future__ import annotations

import json
import re

import pytest

from serving.config import ExportConfig
from serving.deploy import dockerfile, resource_name, vllm_arguments
from serving.targets import Layout


def _layout(**fields):
    return Layout(ExportConfig(model="m", **fields), "1", 64, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Support_Desk", "support-desk"),
        ("7B_chat", "m-7b-chat"),
        ("desk_", "desk"),
        ("7" + "b" * 63, "m-7" + "b" * 60),
        ("a" * 62 + "_b", "a" * 62),
    ],
)
def test_a_model_name_becomes_a_name_that_a_service_may_have(name, expected):
    made = resource_name(_layout(name=name))
    assert made == expected
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", made)


def test_engine_arguments_become_flags():
    plain = vllm_arguments(_layout(target="vllm"))
    given = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "quantization": None,
        "max_num_seqs": 0,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        "cudagraph_capture_sizes": [1, 2],
    }
    flags = vllm_arguments(_layout(target="vllm", engine_args=given))[len(plain) :]
    assert flags == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--max-num-seqs", "0"),
        *("--speculative-config", json.dumps(given["speculative_config"])),
        *("--cudagraph-capture-sizes", "[1, 2]"),
    ]


def test_the_image_is_given_versions_that_a_package_index_has(monkeypatch):
    versions = {"torch": "2.9.0+cu128", "transformers": "5.23.0", "peft": "0.21.0"}
    monkeypatch.setattr("serving.deploy.package_versions", lambda: versions)
    assert "install --no-cache-dir torch==2.9.0 transformers==5.23.0 peft==0.21.0\n" in dockerfile(
        _layout(target="triton-python")
    )
