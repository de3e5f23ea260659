"""The held-out rows an evaluation reads: prompts, preference pairs, texts. Only eval splits are opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import read_split
from data_prep.records import Kind
from eval.generation import encode_prompt
from eval.perplexity import ScoredRow, encode_conversation, encode_text
from posttrain.errors import DataError
from posttrain.models import whole_dialogue

Message = dict[str, str]
GoldScorer = Callable[[str, Mapping[str, Any], bool], Any]


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, its tokens, its source and meta, and the facts a rubric needs (empty: none)."""

    id: str
    messages: list[Message]
    ids: list[int]
    facts: dict[str, Any]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal prompts: what bootstrap intervals resample by."""
        return json.dumps(self.messages, sort_keys=True)


def gold_scorer(name: str) -> GoldScorer:
    """The rubric of that name: (answer, facts, finished) -> RubricScore(total, parts)."""
    from data_prep.tiny import rubric

    return {"support_desk": rubric.score}[name]


def pick(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` row numbers, ascending, drawn without replacement; all if there are fewer."""
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def load_prompts(
    path: Path, tokenizer: Any, *, wanted: int, max_tokens: int, needs_facts: bool, seed: int
) -> tuple[list[Prompt], dict[str, int]]:
    """A seeded sample of the eval split, and how many rows were available, too long, and used.

    Raises:
        DataError: no prompt is short enough, or a rubric is named and a prompt carries no facts.
    """
    rows = read_split(path, "eval", "prompt").to_list()
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    prompts: dict[int, Prompt] = {}
    too_long = 0
    for i in order:
        if len(prompts) == wanted:
            break
        ids = encode_prompt(tokenizer, rows[i]["prompt"])
        if len(ids) > max_tokens:
            too_long += 1
            continue
        meta = json.loads(rows[i]["meta"] or "{}")
        facts = meta.get("facts", {})
        if needs_facts and not facts:
            raise DataError(
                f"{path}: prompt {rows[i]['id']} has no `facts` in its meta, which the gold rubric needs; "
                "remove `gold`, or use prompts of the generator it belongs to"
            )
        prompts[i] = Prompt(rows[i]["id"], rows[i]["prompt"], ids, facts, rows[i]["source"], meta)
    if not prompts:
        raise DataError(
            f"{path}: all {len(rows)} eval prompts are longer than max_prompt_tokens {max_tokens}"
        )
    counts = {"available": len(rows), "too_long": too_long, "used": len(prompts)}
    return [prompts[i] for i in sorted(prompts)], counts


@dataclass(frozen=True)
class Pairs:
    """Held-out preference pairs as token rows, with the noiseless scores where every pair has them."""

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]
    chosen_text: list[str]
    rejected_text: list[str]
    prompts: list[str]
    groups: list[str]
    gold_chosen: np.ndarray | None
    gold_rejected: np.ndarray | None
    subsets: list[str]
    cut: int


def load_pairs(path: Path, tokenizer: Any, max_tokens: int, subset_column: str | None = None) -> Pairs:
    """The whole eval split. Rows over `max_tokens` keep their end, where the answer is, and are counted.

    `subsets` are the values of `subset_column` in the meta of each pair, or the sources without one.

    Raises DataError when no pair has the column.
    """
    rows = read_split(path, "eval", "preference").to_list()
    encoded: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    cut = 0
    for row in rows:
        lengths = []
        for side, ids_of_side in encoded.items():
            text = whole_dialogue(tokenizer, [*row["prompt"], *row[side]])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            lengths.append(len(ids))
            ids_of_side.append(ids[-max_tokens:])
        cut += max(lengths) > max_tokens
    metas = [json.loads(row["meta"] or "{}") for row in rows]
    has_gold = all("gold_chosen" in meta and "gold_rejected" in meta for meta in metas)

    def gold(side: str) -> np.ndarray | None:
        return np.array([meta[f"gold_{side}"] for meta in metas], dtype=np.float64) if has_gold else None

    return Pairs(
        encoded["chosen"],
        encoded["rejected"],
        [row["chosen"][-1]["content"] for row in rows],
        [row["rejected"][-1]["content"] for row in rows],
        [json.dumps(row["prompt"], sort_keys=True) for row in rows],
        [row["group"] for row in rows],
        gold("chosen"),
        gold("rejected"),
        _subsets(path, rows, metas, subset_column),
        cut,
    )


def _subsets(
    path: Path, rows: list[dict[str, Any]], metas: list[dict[str, Any]], column: str | None
) -> list[str]:
    if column is None:
        return [row["source"] for row in rows]
    if not any(column in meta for meta in metas):
        raise DataError(
            f"{path}: no pair has `{column}` in its meta, which subset_column asks for\n"
            f"    set `meta_columns: [{column}]` on its source in the curate stage, or remove subset_column"
        )
    return [str(meta.get(column, "(none)")) for meta in metas]


def load_scored_rows(
    path: Path, kind: Kind, tokenizer: Any, *, wanted: int, max_tokens: int, seed: int
) -> list[ScoredRow]:
    """A seeded sample of an eval split of kind `text` or `conversation`, ready for `eval.perplexity`."""
    dataset = read_split(path, "eval", kind)
    rows: Sequence[dict[str, Any]] = dataset.select(pick(len(dataset), wanted, seed)).to_list()
    if kind == "text":
        return [encode_text(tokenizer, row["text"], max_tokens) for row in rows]
    return [encode_conversation(tokenizer, row["messages"], max_tokens) for row in rows]
