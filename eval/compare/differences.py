"""Differences between two models on the same prompts, with intervals, tests and their correction. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from eval.compare.runs import Aligned
from eval.statistics import benjamini_hochberg, holm, mcnemar, paired_difference, permutation_test

Correction = Literal["holm", "bh"]
CORRECTIONS: dict[str, Callable[[Sequence[float]], np.ndarray]] = {"holm": holm, "bh": benjamini_hochberg}
HIGHER_IS_BETTER = ("gold", "rm", "finished")
"""Metrics, and groups of metrics (`gold_parts/...`), of which more is better; others only shift."""
FEWEST_IN_A_SLICE = 10
MOST_VALUES = 12
"""A column of meta with more values than this is no slice."""
LENGTH_BUCKETS = 4


def is_quality(metric: str) -> bool:
    """Whether more of it is better."""
    return metric in HIGHER_IS_BETTER or metric.startswith(("gold_parts/", "task/"))


def differences(aligned: Aligned, confidence: float, samples: int, seed: int) -> list[dict[str, Any]]:
    """One row per metric that both models have: both means, B - A with its paired interval, and the p-value.

    Metrics of 0 and 1 are tested by McNemar's exact test where every prompt is there once, all else by the
    paired permutation test; prompts that are there several times are one cluster.
    """
    rows = []
    for metric, first in aligned.a.scores.items():
        second = aligned.b.scores.get(metric)
        if second is None:
            continue
        interval = paired_difference(second, first, aligned.clusters, confidence, samples, seed)
        rows.append(
            {
                "model": aligned.label,
                "metric": metric,
                "a": float(first.mean()),
                "b": float(second.mean()),
                "difference": interval.as_dict(),
                "better": is_quality(metric),
                **_test(second, first, aligned.clusters, seed),
            }
        )
    return rows


def left_out(aligned: Aligned) -> list[dict[str, str]]:
    """The metrics that cannot be compared, each with the reason: not in both runs, or not of every answer."""
    sides, rows = (("A", aligned.a), ("B", aligned.b)), []
    names = dict.fromkeys(name for _, side in sides for name in (*side.scores, *side.partial))
    for name in names:
        reasons = [
            f"{letter} has it for {side.partial.get(name, 0)} of {len(aligned.ids)} answers"
            for letter, side in sides
            if name not in side.scores
        ]
        if reasons:
            rows.append({"model": aligned.label, "metric": name, "reason": " and ".join(reasons)})
    return rows


def _test(second: np.ndarray, first: np.ndarray, clusters: Sequence[str], seed: int) -> dict[str, Any]:
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    if binary and len(set(clusters)) == len(clusters):
        found = mcnemar(second, first)
    else:
        found = permutation_test(second, first, clusters, seed=seed)
    return {"p_value": found.p_value, "test": found.method}


def correct(rows: Sequence[dict[str, Any]], correction: Correction, alpha: float) -> None:
    """Add to each row `adjusted_p` over all rows, and `verdict`: better, worse, changed, no difference."""
    if not rows:
        return
    adjusted = CORRECTIONS[correction]([row["p_value"] for row in rows])
    for row, p in zip(rows, adjusted.tolist(), strict=True):
        row["adjusted_p"] = p
        gain = row["difference"]["value"]
        if p > alpha or gain == 0:
            row["verdict"] = "no difference"
        elif not row["better"]:
            row["verdict"] = "changed"
        else:
            row["verdict"] = "better" if gain > 0 else "worse"


def slices_of(aligned: Aligned) -> dict[str, np.ndarray]:
    """Masks over the prompts, by `column=value`: source, columns of meta, length of the prompt, language."""
    columns: dict[str, list[str]] = {"source": [str(row.get("source") or "") for row in aligned.rows]}
    for key in dict.fromkeys(key for row in aligned.rows for key in (row.get("meta") or {})):
        tags = [(row.get("meta") or {}).get(key) for row in aligned.rows]
        if all(tag is None or isinstance(tag, (str, int, bool)) for tag in tags):
            columns[f"meta.{key}"] = ["" if tag is None else str(tag) for tag in tags]
    prompts = [" ".join(message["content"] for message in row["prompt"]) for row in aligned.rows]
    columns["prompt length"] = _length_buckets([len(prompt) for prompt in prompts])
    if "meta.language" not in columns:
        columns["language"] = languages(prompts)
    found = {}
    for name, values in columns.items():
        counts = Counter(values)
        if 2 <= len(counts) <= MOST_VALUES:
            for value in counts:
                if value and counts[value] >= FEWEST_IN_A_SLICE:
                    found[f"{name}={value}"] = np.array([other == value for other in values])
    return found


def languages(texts: Sequence[str]) -> list[str]:
    """ISO 639-1 code of each text, empty where too short to tell; all empty without the extra `data`."""
    from importlib.util import find_spec

    if find_spec("py3langid") is None:
        return [""] * len(texts)
    from data_prep.operations.language import UNDETERMINED, Language

    identify = Language(min_confidence=0.9).identify
    codes = [identify(text)[0] for text in texts]
    return ["" if code == UNDETERMINED else code for code in codes]


def _length_buckets(lengths: Sequence[int]) -> list[str]:
    """The quarter of the prompts, by characters, that each prompt is in."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BUCKETS + 1)[1:-1]).round().astype(int))
    names = [f"up to {edges[0]}"] + [
        f"{low + 1} to {high}" for low, high in zip(edges, edges[1:], strict=False)
    ]
    names.append(f"over {edges[-1]}")
    return [names[int(np.searchsorted(edges, length))] for length in lengths]


def slice_differences(
    aligned: Aligned, masks: dict[str, np.ndarray], confidence: float, samples: int, seed: int
) -> list[dict[str, Any]]:
    """The differences of every quality metric on every slice."""
    rows = []
    for name, mask in masks.items():
        clusters = [cluster for cluster, inside in zip(aligned.clusters, mask, strict=True) if inside]
        for metric, first in aligned.a.scores.items():
            if not is_quality(metric) or metric.startswith("gold_parts/") or metric not in aligned.b.scores:
                continue
            a, b = first[mask], aligned.b.scores[metric][mask]
            interval = paired_difference(b, a, clusters, confidence, samples, seed)
            rows.append(
                {
                    "model": aligned.label,
                    "slice": name,
                    "metric": metric,
                    "n": int(mask.sum()),
                    "a": float(a.mean()),
                    "b": float(b.mean()),
                    "difference": interval.as_dict(),
                    "better": True,
                    **_test(b, a, clusters, seed),
                }
            )
    return rows


def texts_shift(aligned: Aligned) -> dict[str, Any]:
    """Length and diversity of both models' answers: words, distinct-1 and distinct-2 (Li et al. 2016)."""
    return {
        "model": aligned.label,
        "a": text_figures(aligned.a.texts),
        "b": text_figures(aligned.b.texts),
        "same_answers": float(
            np.mean([a == b for a, b in zip(aligned.a.texts, aligned.b.texts, strict=True)])
        ),
    }


def text_figures(texts: Sequence[str]) -> dict[str, float]:
    """words: mean per text. distinct_n: share of n-grams of words that differ, over all texts."""
    words = [text.split() for text in texts]
    figures = {
        "words": float(np.mean([len(one) for one in words])),
        "distinct_answers": len(set(texts)) / len(texts),
    }
    for n in (1, 2):
        grams = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
        figures[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else 0.0
    return figures
