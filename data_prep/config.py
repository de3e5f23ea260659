"""Configuration of the `curate` stage. Imports neither torch nor pyarrow."""

from __future__ import annotations

import difflib
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.licences import commercial_problem
from data_prep.operations.config import (
    MixConfig,
    NearDuplicatesConfig,
    OperationConfig,
    SemanticDuplicatesConfig,
    check_sources,
)
from data_prep.records import KINDS, Kind, Side
from posttrain.config import DatasetRef, FileRef, HowOnly, StageConfig, StrictModel

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
    "question_answer",
    "self_instruct",
    "instruction",
    "turns",
]


class ReadConfig(StrictModel):
    """How the files of a source are read. None of it is needed for UTF-8 files of the usual shape."""

    encoding: str = Field(
        "auto",
        description="auto: UTF-8, or UTF-16 and UTF-32 by their byte order mark. Else a codec of Python, "
        "such as latin-1 or cp1252; nothing falls back to one of them by itself.",
    )
    header: bool | None = Field(
        None,
        description="csv, tsv: whether the first row names the columns, which are column_1, column_2, ... "
        "otherwise. Default: no where it holds a number, a line break or more than 64 characters in a cell.",
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="csv, tsv: what separates cells. Default: a tab in .tsv, in .csv the most frequent of "
        "comma, semicolon and tab in the first row.",
    )
    text_unit: Literal["line", "paragraph", "file"] = Field(
        "line", description="txt: what is one document: a line, what blank lines enclose, or the whole file."
    )
    max_row_bytes: int = Field(
        32 << 20, gt=0, description="A row of more bytes is rejected as oversized_row without being held."
    )
    max_decompression_ratio: int = Field(
        250,
        gt=0,
        description="Reading stops, and says so, where more than 64 MiB came out of a compressed file and "
        "that is more than so many times what went in.",
    )

    @field_validator("encoding")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        if name == "auto":
            return name
        try:
            "".encode(name)
        except LookupError as error:
            raise ValueError(
                f"no text encoding {name!r}; give auto or a codec of Python such as latin-1"
            ) from error
        return name


class SourceConfig(StrictModel):
    """Where records come from: files (`path`), a Hub data set (`hub`) or a named generator (`generator`)."""

    path: FileRef | None = Field(
        None,
        description="A .jsonl, .json, .csv, .tsv, .txt or .parquet file, each but parquet also .gz or .zst, "
        "a folder or a glob of them. hub:owner/name is short for `hub`.",
    )
    hub: DatasetRef | None = Field(
        None,
        description="A data set of the Hugging Face Hub, owner/name or owner/name@revision, or a folder that "
        "datasets loads.",
    )
    subset: str | None = Field(None, description="Hub: the data set's configuration. Default: its own.")
    split: str = Field("train", description="Hub: the split to read.")
    revision: str | None = Field(None, description="Hub: branch, tag or commit. Give a commit to repeat it.")
    read: ReadConfig = Field(ReadConfig(), description="How files are read: encoding, cells, limits.")
    format: FormatName = Field(
        "auto",
        description="Row format. auto looks at the fields of each file's first 100 rows and says what it "
        "chose.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames columns before the format reads them, as expected name: name in the file, "
        "e.g. {prompt: question, completion: answer}. A place inside a column is a.b or a[0].b.",
    )
    reasoning: Literal["reject", "think_tags", "drop"] = Field(
        "reject",
        description="Reasoning of assistant turns (parts of type reasoning or thinking, reasoning_content): "
        "reject the row, put it before the answer between <think> and </think>, or leave it out.",
    )
    id_column: str | None = Field(
        None, description="Column whose value is the record's id. Default: a hash of the content."
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="What mixing, licences and dataset.json call the source. Default: its file or generator.",
    )
    licence: str | None = Field(
        None, description="Licence of the source, e.g. an SPDX identifier; kept in dataset.json."
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

    @property
    def label(self) -> str:
        """The source's name, without the folder that it lies in."""
        return self.name or self.generator or self.hub or PurePath(str(self.path)).name

    @field_validator("generator")
    @classmethod
    def _known_generator(cls, name: str | None) -> str | None:
        if name is not None and name not in GENERATORS:
            near = difflib.get_close_matches(name, GENERATORS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(GENERATORS)}"
            raise ValueError(f"unknown generator {name!r}; {hint}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _hub_path(cls, data: Any) -> Any:
        """`path: hub:a/b` is `hub: a/b`, and with `revision: c` both are `hub: a/b@c`."""
        if not isinstance(data, dict):
            return data
        path, revision = data.get("path"), data.get("revision")
        if isinstance(path, str) and path.startswith("hub:"):
            if data.get("hub") is not None:
                raise ValueError("give the data set once, in `path` or in `hub`")
            data = {**data, "path": None, "hub": path.removeprefix("hub:")}
        hub = data.get("hub")
        if isinstance(revision, str) and isinstance(hub, str):
            if "@" in hub:
                raise ValueError("give the revision once, in `hub` or in `revision`")
            data = {**data, "hub": f"{hub}@{revision}", "revision": None}
        return data

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if [self.path, self.hub, self.generator].count(None) != 2:
            raise ValueError("give exactly one of `path` and `generator`, or `hub`")
        if self.generator is not None:
            if self.rows is None:
                raise ValueError("a generator needs `rows`: how many records to make")
            if self.format != "auto" or self.columns or self.group_column or self.use != "chosen":
                raise ValueError(
                    "`format`, `columns`, `group_column` and `use` belong to `path`, not to `generator`"
                )
            if self.meta_columns:
                raise ValueError("`meta_columns` belongs to `path`, not to `generator`")
            if self.id_column or self.reasoning != "reject":
                raise ValueError("`id_column` and `reasoning` belong to `path`, not to `generator`")
        elif self.options or self.seed is not None:
            raise ValueError("`options` and `seed` belong to `generator`, not to `path`")
        if self.path is None and self.read != ReadConfig():
            raise ValueError("`read` belongs to `path`")
        if self.hub is None and (self.subset or self.revision or self.split != "train"):
            raise ValueError("`subset`, `split` and `revision` belong to `hub`")
        return self


class SplitConfig(StrictModel):
    """How records are divided into train.parquet and eval.parquet: sha256(salt, group) < eval_fraction."""

    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Expected share of groups on the eval side.")
    by: Literal["group", "record", "cluster"] = Field(
        "group",
        description="group: records of one group (given by the source, else the words of the first user "
        "turn) land on the same side, in every data set with the same salt and eval_fraction. record: each "
        "distinct content by itself; near copies of a prompt may then straddle the split. cluster: as group, "
        "and rows that near_duplicates and semantic_duplicates find alike are on one side too.",
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
    commercial: bool = Field(
        False,
        description="true: refuse sources whose `licence` is missing, non-commercial or not known to allow "
        "commercial use.",
    )
    commercial_licences: list[str] = Field(
        default_factory=list,
        description="Further licences that allow your commercial use, as written in `licence`.",
    )
    split: SplitConfig = Field(SplitConfig(), description="The train/eval split.")
    max_reject_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of unusable rows; above it the stage fails, writing nothing.",
    )

    engine: Annotated[Literal["local", "ray"], HowOnly()] = Field(
        "local",
        description="What runs the row-local work: local, processes of this machine, or ray, Ray Data on "
        "this machine or a cluster. The bytes written are the same.",
    )
    workers: Annotated[int | None, HowOnly()] = Field(
        None,
        ge=1,
        description="Processes that do the row-local work. Default: this one alone, and with engine ray as "
        "many as the cluster has processors. The bytes written are the same.",
    )
    ray_address: Annotated[str | None, HowOnly()] = Field(
        None,
        description="Engine ray: the cluster, e.g. auto or ray://head:10001. Default: RAY_ADDRESS, or Ray is "
        "started on this machine. The run directory must lie where all machines see it.",
    )
    shard_rows: int = Field(
        1_000_000,
        ge=1,
        description="Most rows of a parquet file: a side of more is written as "
        "train-00000-of-00003.parquet and so on.",
    )
    rejected_rows: bool = Field(
        False,
        description="Write every dropped row in full to rejected.jsonl, with the step that dropped it and "
        "why; redacted where an operation redacts. Rows that could not be read are in rejects.jsonl alone.",
    )

    @property
    def operates(self) -> bool:
        """Whether rows wait for the operations, and dataset.json says what became of each source."""
        return bool(self.operations) or self.commercial

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> CurateConfig:
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError("`ray_address` belongs to `engine: ray`")
        return self

    @model_validator(mode="after")
    def _turns_to_count(self) -> CurateConfig:
        if self.last_user_turns is not None and self.kind == "text":
            raise ValueError("`last_user_turns` needs turns; kind text has none")
        return self

    @model_validator(mode="after")
    def _clusters_to_split_by(self) -> CurateConfig:
        if self.split.by == "cluster" and not any(
            isinstance(operation, (NearDuplicatesConfig, SemanticDuplicatesConfig))
            for operation in self.operations
        ):
            raise ValueError(
                "`split.by: cluster` needs clusters; add {op: near_duplicates, keep: all} to `operations`"
            )
        return self

    @model_validator(mode="after")
    def _operations_fit(self) -> CurateConfig:
        kinds = {operation.op for operation in self.operations}
        if "preference_checks" in kinds and self.kind != "preference":
            raise ValueError(f"`preference_checks` is for kind preference, not {self.kind}")
        names = [source.label for source in self.sources]
        for operation in self.operations:
            if isinstance(operation, MixConfig):
                check_sources(operation, names)
        return self

    @model_validator(mode="after")
    def _commercial_sources(self) -> CurateConfig:
        if self.commercial:
            refused = [
                f"sources.{index} ({source.label}): {problem}"
                for index, source in enumerate(self.sources)
                if source.generator is None
                and (problem := commercial_problem(source.licence, self.commercial_licences))
            ]
            if refused:
                raise ValueError("`commercial: true` refuses " + "; ".join(refused))
        return self
