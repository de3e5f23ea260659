"""Presidio (Microsoft, MIT) as a second search for personal data beside the patterns of `data_prep.pii`.

Without a model its pattern recognisers run on a blank spaCy pipeline; with a spaCy model on disk its named
entities are found too (people, places). Nothing is fetched: no model by name, and Presidio's recogniser of
e-mail addresses reads the list of public suffixes that tldextract ships with.

Source: the recognisers and entity types that https://microsoft.github.io/presidio/supported_entities names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

OURS = {
    "CREDIT_CARD": "CREDIT_CARD",
    "CRYPTO": "CRYPTO",
    "DATE_TIME": "DATE_TIME",
    "EMAIL_ADDRESS": "EMAIL",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "LOCATION": "LOCATION",
    "MAC_ADDRESS": "MAC_ADDRESS",
    "MEDICAL_LICENSE": "MEDICAL_LICENSE",
    "NRP": "NRP",
    "ORGANIZATION": "ORGANIZATION",
    "PERSON": "PERSON",
    "PHONE_NUMBER": "PHONE",
    "UK_NHS": "UK_NHS",
    "URL": "URL",
    "US_BANK_NUMBER": "US_BANK_NUMBER",
    "US_DRIVER_LICENSE": "US_DRIVER_LICENSE",
    "US_ITIN": "US_ITIN",
    "US_PASSPORT": "US_PASSPORT",
    "US_SSN": "SSN",
    "UUID": "UUID",
}
"""Presidio's entity types and what they are called here."""
NAMED_ENTITIES = ("PERSON", "LOCATION", "ORGANIZATION", "NRP")
"""Types that only a model finds."""
ONLY_IF_NAMED = frozenset({"DATE_TIME", "NRP", "ORGANIZATION", "URL", "UUID"})
"""Types that are looked for where `types` names them: most of what they find is no personal data."""
PRESIDIO_TYPES = tuple(OURS.values())
THRESHOLD = 0.35
"""Score from which a finding counts. Presidio gives a phone number without a context word 0.4."""
PIECE = 100_000
"""Characters that are analysed at once: spaCy refuses a million."""


@dataclass(frozen=True)
class Presidio:
    """Finds (start, end, type) in a text. types: of ours, in order of precedence. model: a spaCy model's
    directory. Without it NAMED_ENTITIES are not found.
    """

    types: tuple[str, ...]
    model: Path | None = None

    def __call__(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Findings of the types, from pieces of a long text that end at white space.

        Raises UserError when the model cannot be loaded.
        """
        engine = _engine(self.model)
        # A name the engine has no recogniser of would be warned of for every text.
        known = engine.get_supported_entities("en")
        wanted = [theirs for theirs, ours in OURS.items() if ours in self.types and theirs in known]
        if not wanted:  # Presidio takes no name for all names
            return
        for begin, end in _pieces(text):
            for found in engine.analyze(
                text[begin:end], language="en", entities=wanted, score_threshold=THRESHOLD
            ):
                yield begin + found.start, begin + found.end, OURS[found.entity_type]


def default_types(model: bool) -> tuple[str, ...]:
    """What is looked for when no type is named."""
    return tuple(
        name for name in PRESIDIO_TYPES if name not in ONLY_IF_NAMED and (model or name not in NAMED_ENTITIES)
    )


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    while begin < len(text):
        end = min(begin + PIECE, len(text))
        if end < len(text):
            end = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end), begin) + 1
            end = end if end > begin + 1 else min(begin + PIECE, len(text))
        yield begin, end
        begin = end


def model_directory(path: Path) -> Path:
    """The directory with config.cfg: `path`, or the one inside an installed package of a model.

    Raises UserError when there is none.
    """
    found = [path, *sorted(path.glob("*/"))] if path.is_dir() else []
    for directory in found:
        if (directory / "config.cfg").is_file():
            return directory
    raise UserError(
        f"{path}: is no spaCy model (it has no config.cfg)\n"
        "    name the directory of one, such as that of the installed package en_core_web_lg"
    )


@lru_cache(maxsize=2)
def _engine(model: Path | None) -> Any:
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    suffixes = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=(), fallback_to_snapshot=True)

    class OfflineEmail(EmailRecognizer):
        """Presidio's own asks the network for the list of public suffixes."""

        def validate_result(self, pattern_text: str) -> bool:
            return suffixes(pattern_text).fqdn != ""

    class LoadedEngine(SpacyNlpEngine):
        """A pipeline that is loaded: Presidio would download a model it does not find."""

        def load(self) -> None:
            raise RuntimeError("the pipeline is given, not loaded by name")

    engine: Any = LoadedEngine(models=[{"lang_code": "en", "model_name": "given"}])
    try:
        engine.nlp = {"en": spacy.load(model_directory(model)) if model else spacy.blank("en")}
    except (OSError, ValueError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{model}: spaCy cannot load this model ({first})") from error
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
    analyzer.registry.remove_recognizer("EmailRecognizer")
    analyzer.registry.add_recognizer(OfflineEmail(name="OfflineEmail"))
    return analyzer
