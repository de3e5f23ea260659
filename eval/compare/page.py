"""The page of a comparison: tables, and a browser of samples that sorts and filters in the page itself.

One file, no network: the only script is the one in the template, allowed by its hash in the page's
Content-Security-Policy. What models wrote is text, never markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from eval.compare.differences import slices_of
from eval.compare.runs import Aligned
from eval.pages import page_environment

MOST_SAMPLES = 1000
JUDGES = ("gold", "rm")


def render(figures: dict[str, Any], aligned: Sequence[Aligned]) -> str:
    """The page as text."""
    from markupsafe import Markup

    environment = page_environment()
    source = (resources.files("eval") / "templates" / "compare.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template("compare.html").render(
        figures=figures,
        samples=[row for one in aligned for row in samples(one)],
        slices=sorted({name for one in aligned for name in slices_of(one)}),
        script=Markup(source),
        script_hash=f"sha256-{digest}",
        most=MOST_SAMPLES,
    )


def samples(one: Aligned) -> list[dict[str, Any]]:
    """One row per prompt, the largest change first; at most MOST_SAMPLES.

    gain: B - A by the most trusted judge there is. disagreement: how far the judges, each in units of its own
    spread, differ about the gain; 0 with fewer than two.
    """
    masks = slices_of(one)
    gains = {
        judge: one.b.scores[judge] - one.a.scores[judge]
        for judge in JUDGES
        if judge in one.a.scores and judge in one.b.scores
    }
    first = next(iter(gains.values()), np.zeros(len(one.ids)))
    scaled = [gain / gain.std() if gain.std() > 0 else gain for gain in gains.values()]
    disagreement = np.abs(scaled[0] - scaled[1]) if len(scaled) == 2 else np.zeros(len(one.ids))
    order = np.argsort(-np.abs(first), kind="stable")[:MOST_SAMPLES]
    return [
        {
            "id": one.ids[i],
            "model": one.label,
            "prompt": one.rows[i]["prompt"],
            "slices": [name for name, mask in masks.items() if mask[i]],
            "gain": float(first[i]),
            "disagreement": float(disagreement[i]),
            "same": one.a.texts[i] == one.b.texts[i],
            "sides": [
                {
                    "name": name,
                    "text": side.texts[i],
                    "scores": {metric: float(values[i]) for metric, values in side.scores.items()},
                }
                for name, side in (("A", one.a), ("B", one.b))
            ],
        }
        for i in order.tolist()
    ]
