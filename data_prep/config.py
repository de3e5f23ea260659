"""Configuration of the `curate` stage. Imports neither torch nor pyarrow."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.operations.config import NearDuplicatesConfig, OperationConfig
from data_prep.records import KINDS, Kind, Side
from posttrain.config import FileRef, StageConfig, StrictModel

GENERATORS: dict[str, str] = {"support_desk": "data_prep.tiny.world:generate"}
"""Named generators: "module:function", called (kind, rows, seed, **options), yielding records."""

FormatName = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "sharegpt",
    "alpaca",
    "preference",
    "hh",
    "unpaired_preference",
    "text",
    "prompt",
]


class SourceConfig(StrictModel):
    """Where records come from: files (`path`) or a named generator (`generator`), one of the two."""

    path: FileRef | None = Field(
        None, description="A .jsonl, .jsonl.gz, .json, .json.gz or .parquet file, or a glob of them."
    )
    format: FormatName = Field(
        "auto",
        description="Row format. auto looks at the fields of each file's first row and says what it chose.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames columns before the format reads them, as expected name: name in the file, "
        "e.g. {prompt: question, completion: answer}.",
    )
    group_column: str | None = Field(
        None, description="Column whose value is the split group, e.g. a customer id. Default: see split.by."
    )
    meta_columns: list[str] = Field(
        default_factory=list,
        description="Columns of the file that are kept in the record's meta, for reward functions to read, "
        "e.g. [answer].",
    )
    use: Side = Field(
        "chosen",
        description="Which side of a preference becomes the answer when kind is conversation or text.",
    )
    rows: int | None = Field(
        None, gt=0, description="Generator: how many records to make. Files: read at most this many rows."
    )
    generator: str | None = Field(None, description=f"A bundled generator: {', '.join(GENERATORS)}.")
    seed: int | None = Field(None, ge=0, description="Seed of the generator. Default: the stage's seed.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword options of the generator.")

    @field_validator("generator")
    @classmethod
    def _known_generator(cls, name: str | None) -> str | None:
        if name is not None and name not in GENERATORS:
            near = difflib.get_close_matches(name, GENERATORS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(GENERATORS)}"
            raise ValueError(f"unknown generator {name!r}; {hint}")
        return name

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.generator is None):
            raise ValueError("give exactly one of `path` and `generator`")
        if self.generator is not None:
            if self.rows is None:
                raise ValueError("a generator needs `rows`: how many records to make")
            if self.format != "auto" or self.columns or self.group_column or self.use != "chosen":
                raise ValueError(
                    "`format`, `columns`, `group_column` and `use` belong to `path`, not to `generator`"
                )
            if self.meta_columns:
                raise ValueError("`meta_columns` belongs to `path`, not to `generator`")
        elif self.options or self.seed is not None:
            raise ValueError("`options` and `seed` belong to `generator`, not to `path`")
        return self


class SplitConfig(StrictModel):
    """How records are divided into train.parquet and eval.parquet: sha256(salt, group) < eval_fraction."""

    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Expected share of groups on the eval side.")
    by: Literal["group", "record", "cluster"] = Field(
        "group",
        description="group: records of one group (given by the source, else the words of the first user "
        "turn) land on the same side, in every data set with the same salt and eval_fraction. record: each "
        "distinct content by itself; near copies of a prompt may then straddle the split. cluster: as group, and "
        "rows that the operation near_duplicates finds alike are on one side too.",
    )
    salt: str = Field(
        "posttrain", description="Change it to draw another split; keep it to hold out the same groups."
    )


class FilterConfig(StrictModel):
    """Plain length filters. A record outside the bounds is dropped and counted as too_short or too_long."""

    min_chars: int | None = Field(None, gt=0, description="Fewest characters over all turns of a record.")
    max_chars: int | None = Field(None, gt=0, description="Most characters over all turns of a record.")

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars ({self.min_chars}) is larger than max_chars ({self.max_chars})")
        return self


class CurateConfig(StageConfig):
    """Sources -> typed records -> filters -> exact dedup -> operations -> split -> dataset directory."""

    kind: Kind = Field(
        description=f"What the rows are: {', '.join(KINDS)}. Preference files can feed every kind "
        "but unpaired_preference, which is single answers, each labelled true (good) or false (bad)."
    )
    sources: list[SourceConfig] = Field(min_length=1, description="Read in this order.")
    last_user_turns: int | None = Field(
        None,
        ge=1,
        description="Keep of each dialogue what begins with its Nth-last user turn, and a system turn. The "
        "split group is that of the whole dialogue. Not for kind text.",
    )
    filters: FilterConfig = Field(FilterConfig(), description="Length filters.")
    dedup: bool = Field(
        True, description="Drop records whose whole content (NFKC, case, whitespace aside) was seen before."
    )
    operations: list[OperationConfig] = Field(
        default_factory=list,
        description="What is done with the rows after filters and dedup, in this order (docs/curation.md).",
    )
    split: SplitConfig = Field(SplitConfig(), description="The train/eval split.")
    max_reject_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of unusable rows; above it the stage fails, writing nothing.",
    )

    @model_validator(mode="after")
    def _turns_to_count(self) -> CurateConfig:
        if self.last_user_turns is not None and self.kind == "text":
            raise ValueError("`last_user_turns` needs turns; kind text has none")
        return self

    @model_validator(mode="after")
    def _clusters_to_split_by(self) -> CurateConfig:
        if self.split.by == "cluster" and not any(
            isinstance(operation, NearDuplicatesConfig) for operation in self.operations
        ):
            raise ValueError(
                "`split.by: cluster` needs clusters; add {op: near_duplicates, keep: all} to `operations`"
            )
        return self
