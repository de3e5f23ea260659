"""Presidio beside the patterns of `pii`: offline, mapped to our types, and said in the reports."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.personal import PersonalData, scrubber
from data_prep.pii import RULES, Redactor, find
from data_prep.pii_presidio import PIECE, Presidio, default_types, model_directory
from data_prep.records import TextRecord
from posttrain.errors import UserError
from posttrain.stage import execute_stage
from tests.integration.test_curate import config, digests, save
from tests.integration.test_curate_operations import curate, rows_of

presidio = pytest.importorskip("presidio_analyzer", reason="pip install 'posttrain[presidio]'")
TEXT = "Ann Lee, ann@shop.co.uk, 541-714-1388, 1BoatSLRHtKNngkdXEeobR76b53LETtpyT, 00:1B:44:11:3A:B7"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real spaCy pipeline on disk whose named entities come from a list: PERSON and GPE."""
    import spacy

    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns(
        [
            {"label": "PERSON", "pattern": "Ann Lee"},
            {"label": "GPE", "pattern": "Paris"},
            {"label": "ORG", "pattern": "Acme"},
        ]
    )
    path = tmp_path_factory.mktemp("spacy") / "people"
    pipeline.to_disk(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Connections and look-ups that are tried; each fails."""
    tried: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def named(text: str, search: Presidio) -> set[tuple[str, str]]:
    return {(type, text[start:end]) for start, end, type in search(text)}


def test_pattern_recognisers_need_neither_model_nor_network(offline: list[object]) -> None:
    from data_prep import pii_presidio

    pii_presidio._engine.cache_clear()
    found = named(TEXT, Presidio(default_types(model=False)))
    assert found >= {
        ("EMAIL", "ann@shop.co.uk"),
        ("PHONE", "541-714-1388"),
        ("CRYPTO", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT"),
        ("MAC_ADDRESS", "00:1B:44:11:3A:B7"),
    }
    assert "PERSON" not in {type for type, _ in found}
    assert not named("write to ann@shop.nosuchsuffix", Presidio(("EMAIL",)))
    assert offline == []


def test_nothing_is_looked_for_that_was_not_named() -> None:
    """Presidio takes an empty list of types for all of them."""
    assert named(TEXT, Presidio(("AWS_KEY",))) == set()
    assert named(TEXT, Presidio(("AWS_KEY", "CRYPTO"))) == {("CRYPTO", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT")}


def test_a_model_adds_people_and_places(people: Path, offline: list[object]) -> None:
    text = "Ann Lee of Acme went to Paris"
    assert named(text, Presidio(default_types(model=True), people)) == {
        ("PERSON", "Ann Lee"),
        ("LOCATION", "Paris"),
    }
    assert named(text, Presidio(("ORGANIZATION",), people)) == {("ORGANIZATION", "Acme")}
    assert model_directory(people.parent) == people, "the folder of an installed package holds it one deeper"
    assert offline == []


def test_our_types_come_first_and_pseudonyms_are_by_record(people: Path) -> None:
    redactor = Redactor(RULES, (Presidio(default_types(model=True), people),))
    assert redactor.redact("Ann Lee <ann@shop.example>, or Ann Lee's key pt-x") == (
        "[PERSON_1] <[EMAIL_1]>, or [PERSON_1]'s key pt-x"
    )
    assert redactor.redact("Paris, Ann Lee") == "[LOCATION_1], [PERSON_1]"
    assert redactor.counts == {"PERSON": 3, "EMAIL": 1, "LOCATION": 1}
    assert [f.type for f in find("541-714-1388", RULES, (Presidio(("PHONE",)),))] == ["PHONE"]


def test_long_texts_are_read_to_their_end() -> None:
    text = "word " * (PIECE // 4) + "x" * (PIECE + 5) + " 541-714-1388"
    ((kind, value),) = named(text, Presidio(("PHONE",)))
    assert (kind, value) == ("PHONE", "541-714-1388")


@pytest.mark.parametrize("action", ["redact", "drop", "find"])
def test_the_operation_and_its_reports_use_both(people: Path, action: str) -> None:
    operation = PersonalData(action, RULES, (Presidio(("PERSON",), people),))
    (verdict,) = operation.apply(
        [Row(TextRecord("I am Ann Lee", id="Ann Lee", meta='{"by": "Ann Lee"}'), "f", 1)]
    )
    clean = scrubber([operation])
    if action == "find":
        assert isinstance(verdict, Kept) and verdict.record.text == "I am Ann Lee" and clean is None
        return
    assert clean is not None and clean("so says Ann Lee") == "so says [PERSON_1]"
    if action == "drop":
        assert verdict == Dropped("personal_data", "PERSON 3")
    else:
        assert isinstance(verdict, Kept) and verdict.record.text == "I am [PERSON_1]"
        assert "Ann" not in verdict.record.id and "Ann" not in verdict.record.meta


def test_the_stage_says_what_it_cannot_find_without_a_model(people: Path, tmp_path: Path) -> None:
    texts = [f"Ann Lee asks, number {n}, of Paris" for n in range(40)] + [TEXT]
    source = save(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    for name, extra in (("without", {}), ("with", {"presidio_model": str(people)})):
        operation = {"op": "pii", "backend": "presidio", **extra}
        info, _ = curate(config("text", source, operations=[operation]), tmp_path / name)
        (ledger,) = info["operations"]
        kept = json.dumps(rows_of(tmp_path / name))
        page = (tmp_path / name / "report.html").read_text() + (tmp_path / name / "card.md").read_text()
        assert ("Ann Lee" in kept) == ("not_found_without_a_model" in page) == (name == "without")
        assert ("Ann Lee" in page) <= (name == "without")
        assert "[CRYPTO_1]" in kept
        assert ledger["settings"]["backend"] == "presidio"
    assert ledger["settings"]["presidio_model"] == "people"
    curate(config("text", source, operations=[operation]), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "with")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"types": ["PERSON"]}, "set `backend: presidio`"),
        ({"types": ["PERSON"], "backend": "presidio"}, "only a model finds PERSON"),
        ({"types": ["CRYPT"], "backend": "presidio"}, "did you mean 'CRYPTO'"),
        ({"presidio_model": "x"}, "belongs to `backend: presidio`"),
    ],
)
def test_settings_that_do_not_fit_are_named(block: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("text", "a.jsonl", operations=[{"op": "pii", **block}])


def test_what_is_missing_or_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    source = save(tmp_path / "a.jsonl", [{"text": "a"}])
    operation = {"op": "pii", "backend": "presidio", "presidio_model": str(tmp_path)}
    settings = config("text", source, operations=[operation])
    with pytest.raises(UserError, match="is no spaCy model"):
        curate(settings, tmp_path / "out")
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "presidio_analyzer" else whole(name)
    )
    with pytest.raises(UserError, match=r"pii needs the package presidio_analyzer.*\n.*posttrain.presidio."):
        execute_stage("curate", settings, tmp_path / "out2", console=Console(file=io.StringIO()))
