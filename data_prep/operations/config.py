"""Settings of the operations. Imports neither torch nor pyarrow."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_prep.operations.quality_rules import RULES
from data_prep.pii import OPTIONAL, TYPES, custom_rules
from data_prep.pii_presidio import NAMED_ENTITIES, PRESIDIO_TYPES
from posttrain.config import DatasetRef, FileRef, ForeignModelRef, StrictModel

Part = Literal["whole", "prompt", "answer"]
_PART = "What of a record is compared: whole, prompt (all turns before the answer), or answer."


class _Operation(StrictModel):
    """What every operation has."""

    examples: int = Field(
        3, ge=0, le=100, description="Rows shown per drop reason in dataset.json and report.html."
    )


class DuplicatesConfig(_Operation):
    """Drops rows with the content of an earlier one: as `dedup: true`, but where it stands in the list."""

    op: Literal["duplicates"]


class NearDuplicatesConfig(_Operation):
    """Near-duplicates: MinHash candidates, confirmed by exact Jaccard similarity, clustered."""

    op: Literal["near_duplicates"]
    part: Part = Field("whole", description=_PART)
    threshold: float = Field(
        0.7, gt=0, le=1, description="Jaccard similarity of word shingles from which two rows are alike."
    )
    words: int = Field(
        3, ge=1, description="Words of a shingle; of scripts without spaces a character is a word."
    )
    keep: Literal["first", "all"] = Field(
        "first",
        description="first: of a cluster only its first row stays. all: rows stay and are tagged with their "
        "cluster; with `split.by: cluster` they land on one side.",
    )
    search: Literal["minhash", "exact"] = Field(
        "minhash",
        description="minhash: candidates by MinHash and LSH, each confirmed; a few of a thousand pairs near "
        "the threshold are missed. exact: no pair is missed; some four times slower, 1 GB at 100,000 rows.",
    )
    bands: int = Field(
        32, ge=1, description="Bands of the LSH: more find more pairs near the threshold and take longer."
    )
    rows: int = Field(5, ge=1, description="Rows of a band: fewer find more pairs and compare more.")
    seed: int = Field(0, ge=0, description="Seed of the permutations.")


class SemanticDuplicatesConfig(_Operation):
    """Rows that say the same in other words: embeddings of a local model, clusters of cosine similarity."""

    op: Literal["semantic_duplicates"]
    model: ForeignModelRef = Field(
        description="A sentence-transformers model: a directory, or an id of the Hub. It runs on the CPU."
    )
    part: Part = Field("whole", description=_PART)
    threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Cosine similarity from which two rows are alike. It depends on the model: 0.9 is for "
        "all-MiniLM-L6-v2, where it finds 68 % of the rephrased GSM8K questions (docs/curation.md).",
    )
    keep: Literal["first", "all"] = Field(
        "first",
        description="first: of a cluster only its first row stays. all: rows stay and are tagged with their "
        "semantic_cluster; with `split.by: cluster` they land on one side.",
    )
    part_rows: int = Field(
        20_000,
        ge=2,
        description="Up to so many rows all pairs are compared. More rows are divided by k-means into parts "
        "of about this size, and pairs across parts are missed.",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of k-means.")


class DecontaminateConfig(_Operation):
    """Drops rows that hold text of evaluation sets; lists rows that are near an item for review."""

    op: Literal["decontaminate"]
    against: list[DatasetRef] = Field(
        min_length=1,
        description="Evaluation sets: files, folders of files, or dataset directories (their eval side).",
    )
    fields: list[str] = Field(
        default_factory=list,
        description="Fields of the evaluation rows that are compared, e.g. [question]. Default: every text.",
    )
    part: Part = Field("whole", description=_PART)
    ngram: int = Field(
        13, ge=0, description="A row that shares this many words in a row is dropped. 0: never."
    )
    coverage_ngram: int = Field(
        8, ge=0, description="Length in words of the runs that coverage is counted by. 0: no such rule."
    )
    coverage: float = Field(
        0.5, gt=0, le=1, description="Share of a row's words in shared runs from which it is dropped."
    )
    common: int = Field(
        10, ge=1, description="Runs in more items of a set than this are its boilerplate and do not count."
    )
    review_above: float | None = Field(
        0.6,
        gt=0,
        le=1,
        description="TF-IDF cosine to an item from which a row is listed in review.jsonl; null: no list.",
    )


class UnicodeConfig(_Operation):
    """Repairs of the text itself."""

    op: Literal["unicode"]
    mojibake: bool = Field(True, description="Undo text decoded with the wrong codec (ftfy).")
    line_ends: bool = Field(True, description="CR LF and CR become LF.")
    control: bool = Field(True, description="Control characters but tab and line feed go.")
    zero_width: bool = Field(True, description="U+200B, U+2060 and U+FEFF go; joiners stay.")
    nfc: bool = Field(True, description="Composed form (Unicode NFC).")


class LanguageConfig(_Operation):
    """Language identification (py3langid)."""

    op: Literal["language"]
    keep: list[str] = Field(
        default_factory=list, description="ISO 639-1 codes to keep, e.g. [en, de]. Empty: all are tagged."
    )
    min_confidence: float = Field(
        0.5, ge=0, le=1, description="Below it the language is und (undetermined), which is always kept."
    )
    min_letters: int = Field(20, ge=0, description="Texts of fewer letters are und.")
    action: Literal["tag", "drop"] = Field("tag", description="What becomes of languages not in `keep`.")
    part: Part = Field("whole", description=_PART)

    @model_validator(mode="after")
    def _something_to_drop(self) -> LanguageConfig:
        if self.action == "drop" and not self.keep:
            raise ValueError("`action: drop` needs `keep`: the languages that stay")
        return self


class QualityConfig(_Operation):
    """Rules of Gopher, C4 and FineWeb over each text of the part."""

    op: Literal["quality"]
    rules: list[str] | None = Field(
        None,
        description="Names of rules (docs/curation.md). Default: those that fit answers of an assistant.",
    )
    bounds: dict[str, float] = Field(
        default_factory=dict, description="Other bounds than the rules' own, by rule."
    )
    action: Literal["tag", "drop"] = Field("tag", description="tag: rows stay, with the rules they fail.")
    part: Part = Field("answer", description=_PART)

    @model_validator(mode="after")
    def _known_rules(self) -> QualityConfig:
        for name in (*(self.rules or ()), *self.bounds):
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"rules are {', '.join(RULES)}"
                raise ValueError(f"unknown rule {name!r}; {hint}")
        return self

    def chosen(self) -> list[str]:
        """The rules that are applied, in order."""
        return [name for name in RULES if (RULES[name].default if self.rules is None else name in self.rules)]


class LengthConfig(_Operation):
    """Length in tokens of the rendered chat template; of a preference, of its longer side."""

    op: Literal["length"]
    tokenizer: ForeignModelRef = Field(description="The model whose tokenizer and chat template count.")
    min_tokens: int | None = Field(None, gt=0, description="Fewer tokens: too_few_tokens.")
    max_tokens: int | None = Field(None, gt=0, description="More tokens: too_many_tokens.")
    tag: bool = Field(False, description="Put the number of tokens into the row's meta.")

    @model_validator(mode="after")
    def _ordered(self) -> LengthConfig:
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})")
        return self


class PiiConfig(_Operation):
    """Personal data and secrets with a form of their own; names and addresses of people are not found."""

    op: Literal["pii"]
    action: Literal["find", "redact", "drop"] = Field(
        "redact",
        description="find: tag types and counts. redact: pseudonyms such as [EMAIL_1]. drop: the row.",
    )
    types: list[str] | None = Field(
        None, description="Types to look for. Default: all but those docs/curation.md says must be named."
    )
    backend: Literal["patterns", "presidio"] = Field(
        "patterns",
        description="presidio: besides the patterns, the recognisers of Presidio (extra `presidio`).",
    )
    presidio_model: FileRef | None = Field(
        None,
        description="Directory of a spaCy model for Presidio, which then finds PERSON and LOCATION too. "
        "Nothing is downloaded. Default: patterns alone.",
    )
    patterns: dict[str, str] = Field(
        default_factory=dict, description="Types of one's own, in capitals: a Python regular expression each."
    )

    key_file: FileRef | None = Field(
        None,
        description="A file of at least 16 random bytes: ids and groups that are personal data become hashes "
        "under this key. Without it the hashes are plain, and a phone number can be guessed from its hash.",
    )

    @model_validator(mode="after")
    def _known_types(self) -> PiiConfig:
        presidio = self.backend == "presidio"
        if self.presidio_model is not None and not presidio:
            raise ValueError("`presidio_model` belongs to `backend: presidio`")
        known = [*TYPES, *(rule.type for rule in OPTIONAL), *(PRESIDIO_TYPES if presidio else ())]
        for name in self.types or ():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"types are {', '.join(dict.fromkeys(known))}"
                )
                if name in PRESIDIO_TYPES:
                    hint = "set `backend: presidio`"
                raise ValueError(f"unknown type {name!r}; {hint}")
            if name in NAMED_ENTITIES and self.presidio_model is None:
                raise ValueError(f"only a model finds {name}; set `presidio_model`, or leave the type out")
        custom_rules(self.patterns)
        return self


class ToxicityConfig(_Operation):
    """A scorer of one's own; scores are tags."""

    op: Literal["toxicity"]
    scorer: str = Field(
        pattern=r"^[\w.]+:\w+$", description="module:function, from a list of texts to a list of numbers."
    )
    above: float = Field(0.5, description="Rows of this score or more are counted.")
    part: Part = Field("answer", description=_PART)


class PreferenceChecksConfig(_Operation):
    """Pairs without words, alike or contradictory are dropped; pairs of one prompt stay on one side."""

    op: Literal["preference_checks"]


class MixConfig(_Operation):
    """How many rows of each source; sources are named by `sources.N.name`."""

    op: Literal["mix"]
    weights: dict[str, float] = Field(
        default_factory=dict, description="Share of each source, in any unit; a source without one gets none."
    )
    temperature: float | None = Field(
        None, gt=0, description="Instead of weights: shares are sizes to the power of 1 / temperature."
    )
    max_epochs: float = Field(
        1.0, gt=0, description="How often a row may be used at most; above 1 rows repeat."
    )
    quotas: dict[str, int] = Field(default_factory=dict, description="Most rows of a source.")
    rows: int | None = Field(
        None, gt=0, description="Rows of the mix. Default: as many as the sources give in these shares."
    )
    seed: int = Field(0, ge=0, description="Which rows of a source stay.")

    @model_validator(mode="after")
    def _one_way(self) -> MixConfig:
        if self.weights and self.temperature is not None:
            raise ValueError("give `weights` or `temperature`, not both")
        if any(value <= 0 for value in self.weights.values()):
            raise ValueError("weights must be above 0; leave a source out to use none of it")
        if any(value < 0 for value in self.quotas.values()):
            raise ValueError("quotas must not be negative")
        return self


OperationConfig = Annotated[
    DuplicatesConfig
    | NearDuplicatesConfig
    | SemanticDuplicatesConfig
    | DecontaminateConfig
    | UnicodeConfig
    | LanguageConfig
    | QualityConfig
    | LengthConfig
    | PiiConfig
    | ToxicityConfig
    | PreferenceChecksConfig
    | MixConfig,
    Field(discriminator="op"),
]


def settings_of(config: Any) -> dict[str, Any]:
    """An operation's settings for dataset.json: all but its name and what only the report needs."""
    hidden = {"op", "examples", "key_file"}
    if isinstance(config, PiiConfig) and config.backend == "patterns":
        hidden |= {"backend", "presidio_model"}
    return config.model_dump(mode="json", exclude=hidden)


def check_sources(mix: MixConfig, names: Sequence[str]) -> None:
    """Raises ValueError: two sources of one name, or a weight or quota of a name that none has."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`mix` needs sources of different names; set `name` on those called {', '.join(twice)}"
        )
    for field, named in (("weights", mix.weights), ("quotas", mix.quotas)):
        for name in named:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"sources are {', '.join(names)}"
                raise ValueError(f"mix.{field}: no source is called {name!r}; {hint}")
