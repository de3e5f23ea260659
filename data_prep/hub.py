"""Rows of a data set of the Hugging Face Hub, or of a local folder, through `datasets`, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from posttrain.errors import DataError


def hub_rows(source: SourceConfig, directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) pairs of the source's split, in order; directory: the data set, downloaded.

    Raises DataError when `datasets` does not load it.
    """
    import datasets

    try:
        data = datasets.load_dataset(str(directory), source.subset, split=source.split, streaming=True)
        yield from enumerate(data, start=1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub data set {source.hub}, split {source.split}: datasets does not load it ({first})\n"
            "    check `subset` and `split`, or name a folder of parquet, json or csv files"
        ) from error
