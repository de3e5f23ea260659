"""Figures of a data set: by hand, and the same from chunks as from all rows."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dataset import Split
from data_prep.figures import Figures, figures_of, length_summary, quantile


def pair(chosen: int, rejected: int, source: str = "a", **tags: Any) -> dict[str, Any]:
    turns = {
        "prompt": [{"role": "user", "content": "why"}],
        "chosen": [{"role": "assistant", "content": "x" * chosen}],
        "rejected": [{"role": "assistant", "content": "y" * rejected}],
    }
    return {"id": "1", "source": f"{source}:7", "group": "g", "meta": json.dumps({"tags": tags}), **turns}


def test_by_hand() -> None:
    rows = [pair(3, 1, language="de", tokens=9), pair(2, 4, pii={"EMAIL": 2}), pair(1, 1, "b")]
    figures = figures_of("preference", {"train": rows, "eval": [pair(9, 1, pii={"EMAIL": 1, "IP": 1})]})
    assert figures.rows == {"train": 3, "eval": 1}
    assert figures.sources == {"train": {"a": 2, "b": 1}, "eval": {"a": 1}}
    assert figures.differences == {2: 1, -2: 1, 0: 1, 8: 1}
    assert figures.turns == {1: 4}
    assert (figures.tokens, figures.languages) == ({9: 1}, {"de": 1})
    assert (figures.pii_rows, figures.pii_values) == ({"EMAIL": 2, "IP": 1}, {"EMAIL": 3, "IP": 1})
    assert length_summary(figures) == {
        "prompt": {"min": 3, "p50": 3, "p95": 3, "max": 3},
        "chosen": {"min": 1, "p50": 3, "p95": 9, "max": 9},
        "rejected": {"min": 1, "p50": 1, "p95": 4, "max": 4},
        "chosen_longer": 0.5,
    }


def test_tags_of_the_sources_own_are_not_counted() -> None:
    rows = [pair(1, 2) | {"meta": json.dumps({"tags": tags})} for tags in (["x"], {"pii": "no"}, "y")]
    figures = figures_of("preference", {"train": rows, "eval": []})
    assert not figures.pii_rows and not figures.languages


def test_parts_are_in_the_order_of_the_rows_train_first() -> None:
    def answer(good: bool) -> dict[str, Any]:
        completion = [{"role": "assistant", "content": "yes"}]
        prompt = [{"role": "user", "content": "why"}]
        return {"source": "a", "meta": "{}", "prompt": prompt, "completion": completion, "label": good}

    figures = Figures("unpaired_preference")
    figures.add([answer(True)], "eval")
    figures.add([answer(False), answer(True), answer(True)], "train")
    assert list(length_summary(figures)) == ["prompt", "undesirable", "desirable", "desirable_share"]
    assert length_summary(figures)["desirable_share"] == 0.75


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([0, 0.5, 0.95, 0.99, 1]))
def test_quantiles_are_values_in_order(values: list[int], share: float) -> None:
    counts = {value: values.count(value) for value in values}
    assert quantile(counts, share) == sorted(values)[round(share * (len(values) - 1))]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_chunks_add_up_to_the_whole_through_json(seed: int, chunks: int) -> None:
    draw = random.Random(seed)
    sides: list[Split] = [draw.choice(["train", "eval"]) for _ in range(20)]
    rows = [
        pair(
            draw.randint(1, 9),
            draw.randint(1, 9),
            draw.choice("abc"),
            language=draw.choice(["en", "de"]),
            tokens=draw.randint(1, 5),
            pii={draw.choice(["EMAIL", "IP"]): draw.randint(1, 3)},
        )
        for _ in sides
    ]
    whole, merged = Figures("preference"), Figures("preference")
    for row, side in zip(rows, sides, strict=True):
        whole.add([row], side)
    for begin in range(0, 20, -(-20 // chunks)):
        part = Figures("preference")
        for index in range(begin, min(begin + -(-20 // chunks), 20)):
            part.add([rows[index]], sides[index])
        merged.merge(Figures.from_json(json.loads(json.dumps(part.as_json()))))
    assert json.dumps(merged.as_json()) == json.dumps(whole.as_json())
    assert merged == whole


def test_other_kinds_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="text rows cannot be added to those of prompt rows"):
        Figures("prompt").merge(Figures("text"))
