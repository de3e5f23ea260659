"""schemathesis on the gateway's OpenAPI schema, in front of a real Triton: no answer is a 5xx."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

pytestmark = pytest.mark.slow
EXAMPLES = 40
KEY = {"Authorization": "Bearer pt-alice"}
CHECKED = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_makes_the_gateway_fail(
    start_gateway: Callable[[dict[str, Any]], Any], settings: dict[str, Any], mode: GenerationMode
) -> None:
    """Requests made from the schema, of every operation; those with a model ask one that is there."""
    # Both models can be asked, so that /health is no 503.
    gateway = start_gateway(
        settings | {"models": {name: settings["models"][name] for name in ("support", "long")}}
    )
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{gateway.port}/openapi.json")
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @CHECKED
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                named = {"model": "support"} | {
                    name: "support@stable" for name in ("version_a", "version_b") if name in case.body
                }
                case.body = ({} if "version_a" in named else {"max_tokens": 2}) | case.body | named
            response = case.call_and_validate(headers=KEY, checks=[not_a_server_error])
            statuses.setdefault(case.operation.label, set()).add(response.status_code)

        # An operation without any input has nothing to get wrong.
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):
            check()
    posted = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/votes"}
    assert posted <= statuses.keys()
    if mode is GenerationMode.POSITIVE:
        assert all(200 in statuses[operation] for operation in posted)
        assert len(statuses) == 11
