"""Rows of a data set of the Hugging Face Hub, or of a local folder, through `datasets`, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.config import SourceConfig
from posttrain.errors import DataError


def hub_rows(source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) pairs of the source's split, in order. Raises DataError when it cannot be loaded."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    assert source.hub is not None
    name, _, revision = source.hub.partition("@")
    place = f"hub data set {source.hub}, split {source.split}"
    try:
        data = datasets.load_dataset(
            name,
            source.subset,
            split=source.split,
            revision=source.revision or revision or None,
            streaming=True,
        )
        yield from enumerate(data, start=1)
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, ConnectionError) as error:
        raise DataError(_failed(place, error)) from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_failed(place, error)) from error


def _failed(place: str, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"{place}: datasets does not load it ({first})\n"
        "    check name, subset, split and revision, the network and `hf auth login`, or name a local folder"
    )
