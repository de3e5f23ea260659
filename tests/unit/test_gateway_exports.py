"""What the gateway reads of an export: the version that is asked, and what is wrong with a broken one."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer
from serving.gateway.config import load_config
from serving.gateway.errors import ApiError
from serving.gateway.keys import KEYS_VARIABLE, hash_key
from serving.gateway.prompts import load_renderer
from serving.gateway.routes import load_renderers
from serving.gateway.server import Gateway
from serving.monitor.store import Store
from serving.repository import write_index

TEMPLATES = {"1": "one{{ messages[0].content }}", "2": "two{{ messages[0].content }}"}


@pytest.fixture
def export(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """An export of two versions, each with its own template and limits, and no weights."""
    directory = tmp_path / "export"
    versions = {}
    for version, template in TEMPLATES.items():
        weights = directory / "model_repository" / "desk" / version / "weights"
        tiny_tokenizer.save_pretrained(weights)
        (weights / "chat_template.jinja").write_text(template)
        versions[version] = {
            "name": "desk",
            "version": version,
            "limits": {"max_prompt_characters": 100 * int(version), "max_output_tokens": 20},
            "max_model_len": 64,
            "fingerprints": fingerprint_tokenizer(weights),
            "files": {},
        }
    write_index(directory, versions)
    return directory


def spoil(export: Path) -> None:
    """Cut version 2's tokenizer off in the middle."""
    path = export / "model_repository" / "desk" / "2" / "weights" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")


def write(path: Path, export: Path, *, monitoring: Any = None, **versions: int | None) -> Path:
    """A gateway's file with these versions of one model."""
    routes = {
        label: {"export": str(export), "triton": "127.0.0.1:1", "model_version": number}
        for label, number in versions.items()
    }
    more = {"monitoring": monitoring} if monitoring else {}
    path.write_text(yaml.safe_dump({"models": {"desk": {"versions": routes}}, **more}))
    return path


def test_a_route_has_the_template_and_limits_of_its_own_version(export, tmp_path):
    config = load_config(write(tmp_path / "g.yaml", export, old=1, new=2, latest=None), ())
    renderers = load_renderers(config.models, ThreadPoolExecutor(1))
    found = {}
    for (_, version), renderer in renderers.items():
        prompt = asyncio.run(renderer.chat([{"role": "user", "content": "Hi"}], "refuse"))
        found[version] = (prompt.text, renderer.limits.max_prompt_characters)
    assert found == {1: ("oneHi", 100), 2: ("twoHi", 200), None: ("twoHi", 200)}


def test_a_version_that_the_export_does_not_list(export):
    with pytest.raises(UserError, match=r"export.json: has no version 3; its versions are 1, 2"):
        load_renderer(export, 3, ThreadPoolExecutor(1))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"schema_version": 2}', '{"schema_version": 2, "versions": []}']
)
def test_what_is_no_index(export, text):
    (export / "export.json").write_text(text)
    with pytest.raises(UserError, match=r"export.json: is not the manifest of an export"):
        load_renderer(export, None, ThreadPoolExecutor(1))


def test_the_check_names_a_broken_tokenizer_and_a_missing_version(export, tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, f"a:{hash_key('x')}")
    file = write(tmp_path / "g.yaml", export, v=2)
    assert CliRunner().invoke(app, ["gateway", str(file), "--check"]).exit_code == 0
    missing = CliRunner().invoke(app, ["gateway", str(write(tmp_path / "h.yaml", export, v=3)), "--check"])
    assert (missing.exit_code, "has no version 3" in missing.stderr) == (2, True)
    spoil(export)
    broken = CliRunner().invoke(app, ["gateway", str(file), "--check"])
    assert (broken.exit_code, "its tokenizer cannot be read" in broken.stderr) == (2, True)


def failed(gateway: Gateway) -> float:
    return gateway.metrics.reloads.labels("file", "failed")._value.get()


def test_a_reload_with_a_broken_tokenizer_keeps_the_old_routes(export, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(KEYS_VARIABLE, f"a:{hash_key('x')}")
    monkeypatch.setattr(logging.getLogger("posttrain.gateway"), "propagate", True)
    file = write(tmp_path / "g.yaml", export, v=2)

    async def scenario() -> None:
        gateway = Gateway(load_config(file, ()), file, ())
        await gateway.start()
        table = gateway.router.table
        spoil(export)
        with pytest.raises(ApiError, match="its tokenizer cannot be read") as caught:
            await gateway.reload_for_admin()
        assert (caught.value.status, failed(gateway)) == (409, 1)
        await gateway.reload_quietly()
        assert failed(gateway) == 2

        async def unforeseen(_: object) -> None:
            raise RuntimeError("what may hold anything")

        monkeypatch.setattr(gateway.router, "load", unforeseen)
        await gateway.reload_quietly()
        assert failed(gateway) == 3
        assert gateway.router.table is table
        await gateway.router.close()

    asyncio.run(scenario())
    # Once each: pytest also listens at the logger itself where an earlier test left it not propagating.
    records = [record for record in dict.fromkeys(caplog.records) if record.message == "reload_failed"]
    details = [record.fields["detail"] for record in records]
    assert [detail == "RuntimeError" for detail in details] == [False, False, True]


def test_the_check_says_when_the_database_cannot_be_used(export, tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, f"a:{hash_key('x')}")

    def check(database: Path) -> tuple[int, str]:
        file = write(tmp_path / "g.yaml", export, v=2, monitoring={"database": str(database)})
        done = CliRunner().invoke(app, ["gateway", str(file), "--check"])
        return done.exit_code, done.stderr

    new, text = tmp_path / "new.sqlite", tmp_path / "text"
    assert check(new)[0] == 0
    assert not new.exists(), "a check makes nothing"
    text.write_text("no database, but some text")
    for wrong, why in (
        (text, "file is not a database"),
        (tmp_path, "unable to open database file"),
        (tmp_path / "none" / "new.sqlite", "there is no directory"),
    ):
        code, said = check(wrong)
        assert (code, f"{wrong} cannot be used ({why}" in said) == (2, True), said
    store = Store(new, 0, 30)
    store.write([])
    assert check(new)[0] == 0, "while a gateway uses it"
    store.close()
