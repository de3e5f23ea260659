"""Settings of the operations. Imports neither torch nor pyarrow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config import StrictModel

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
    bands: int = Field(
        21, ge=1, description="Bands of the LSH: more find more pairs near the threshold and take longer."
    )
    rows: int = Field(6, ge=1, description="Rows of a band: fewer find more pairs and compare more.")
    seed: int = Field(0, ge=0, description="Seed of the permutations.")


OperationConfig = Annotated[
    DuplicatesConfig | NearDuplicatesConfig,
    Field(discriminator="op"),
]


def settings_of(config: Any) -> dict[str, Any]:
    """An operation's settings for dataset.json: all but its name and what only the report needs."""
    return config.model_dump(mode="json", exclude={"op", "examples"})
