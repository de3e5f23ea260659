"""The figures drawn from eval.json, the PPO log and the timings; left out where numbers are absent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from eval.report.curves import Figure
from eval.report.load import Pipeline, Stage
from posttrain.charts import (
    Bar,
    Line,
    Mark,
    dot_rows,
    histogram,
    interval_bars,
    line_chart,
    reliability,
    scatter,
    stacked_bars,
)
from posttrain.svg import WIDTH

Results = dict[str, Any]
PART_NAMES = {
    "answers": "answers",
    "ids": "right ids",
    "polite": "polite",
    "concise": "concise",
    "ends": "ends well",
    "private": "no leak",
}


def model_colours(results: Results) -> dict[str, int]:
    """Palette index by model name: 0 (grey) for the baseline, 1, 2, ... for the others in order."""
    others = [name for name in results["models"] if name != results["baseline"]]
    return {name: 0 if name == results["baseline"] else 1 + others.index(name) for name in results["models"]}


def _bar(label: str, interval: dict[str, Any], colour: int) -> Bar:
    return Bar(label, interval["value"], interval["low"], interval["high"], colour)


def _legend(results: Results) -> list[tuple[str, int]]:
    return list(model_colours(results).items())


def score_figures(results: Results) -> list[Figure]:
    """Mean score and win rate by every judge, then the parts of the gold score."""
    figures = []
    for key, title in (("gold", "Gold score"), ("rm", "Reward-model score")):
        figures += _score_bars(results, key, title) + _win_bars(results, key, title)
    return figures + _gold_parts(results)


def _score_bars(results: Results, key: str, title: str) -> list[Figure]:
    bars = _bars(results, key)
    if not bars:
        return []
    caption = f"Mean over the held-out prompts; whiskers are {results['confidence']:.0%} intervals. "
    caption += {
        "gold": "The rubric is a program that training never sees unless a configuration names it.",
        "rm": "What the policies were steered by: a rise here without one in gold is over-optimisation.",
    }[key]
    return [Figure(title, interval_bars(bars, "mean score", title), caption)]


def _win_bars(results: Results, key: str, title: str) -> list[Figure]:
    bars = _bars(results, f"{key}_win_rate")
    if not bars:
        return []
    rates = [(bar.label, results["models"][bar.label][f"{key}_win_rate"]) for bar in bars]
    counts = ", ".join(f"{name} {rate['wins']}/{rate['ties']}/{rate['losses']}" for name, rate in rates)
    full = f"Win rate against {results['baseline']}, by {title.lower()}"
    caption = "Same prompt, same random numbers; a tie is half a win. Beyond the dashed line is better than "
    caption += f"{results['baseline']}. Won/tied/lost: {counts}."
    return [Figure(full, interval_bars(bars, "share of prompts", full, guide=0.5), caption)]


def _gold_parts(results: Results) -> list[Figure]:
    colours = model_colours(results)
    scored = {name: m["gold_parts"] for name, m in results["models"].items() if m.get("gold_parts")}
    if not scored:
        return []
    rows = [
        (
            PART_NAMES.get(part, part),
            [_bar(name, parts[part], colours[name]) for name, parts in scored.items()],
        )
        for part in next(iter(scored.values()))
    ]
    svg = dot_rows(rows, "mean over answers", "Gold score by part", 2 * WIDTH)
    caption = "What the gold score is made of: the share of answers that pass each part."
    return [Figure("Gold score by part", svg, caption, _legend(results), wide=True)]


def _bars(results: Results, key: str) -> list[Bar]:
    colours = model_colours(results)
    return [
        _bar(name, model[key], colours[name]) for name, model in results["models"].items() if key in model
    ]


def frontier_figures(pipelines: Sequence[Pipeline], results: Results) -> list[Figure]:
    """Score against KL: where the models end, and the way PPO took; then reward-model score against gold."""
    colours = model_colours(results)
    figures = []
    measured = {name: m for name, m in results["models"].items() if "kl_k1" in m}
    for key, title in (("rm", "Reward-model score against KL"), ("gold", "Gold score against KL")):
        marks = [
            Mark(
                name, m["kl_k1"]["value"], m[key]["value"], colours[name], _range(m["kl_k1"]), _range(m[key])
            )
            for name, m in measured.items()
            if key in m
        ]
        if not marks:
            continue
        trails = ppo_trails(pipelines, colours, "score" if key == "rm" else "reward/gold")
        caption = (
            "Up and left is better: more score for less drift from the reference. Crosses are intervals."
        )
        if trails:
            caption += " Small dots: PPO's rollouts during training, on training prompts."
        svg = scatter(marks, trails, "KL to the reference, nats per answer", "mean score", title)
        figures.append(Figure(title, svg, caption))
    view = results.get("over_optimisation") or {}
    lines = [
        Line(name, [b["rm"] for b in v["bins"]], [b["gold"] for b in v["bins"]], colours[name])
        for name, v in view.items()
    ]
    if lines:
        caption = "Answers sorted by reward-model score into bins. Rising curves mean the reward model ranks "
        caption += "answers as gold does; a curve that turns down at its right end is reward hacking."
        title = "Does a higher reward mean a better answer?"
        svg = line_chart(
            lines, "reward-model score (bin mean)", "gold score (bin mean)", title, (), 2 * WIDTH
        )
        figures.append(Figure(title, svg, caption, _legend(results), wide=True))
    return figures


def _range(interval: dict[str, Any]) -> tuple[float, float]:
    return interval["low"], interval["high"]


def ppo_trails(pipelines: Sequence[Pipeline], colours: dict[str, int], metric: str) -> list[Line]:
    """A metric over KL per rollout of every PPO stage of the first pipeline that logs it."""
    trails = []
    for stage in pipelines[0].stages:
        if stage.kind == "ppo":
            points = [(row["kl"], row[metric]) for row in stage.metrics if {"kl", metric} <= row.keys()]
            points = [(x, y) for x, y in points if x is not None and y is not None]
            if points:
                colour = colours.get(stage.name, 2)
                trails.append(Line(stage.name, [x for x, _ in points], [y for _, y in points], colour))
    return trails


def reward_figures(report: dict[str, Any]) -> list[Figure]:
    """Reliability before and after temperature, and the margins."""
    against = "gold" if report["gold"] is not None else "labels"
    numbers = report[against]
    what = "the noiseless gold" if against == "gold" else "the labels"
    winner = "the better answer by gold" if against == "gold" else "the chosen answer"
    curves = [
        (name, numbers[when]["bins"], colour)
        for name, when, colour in (("as trained", "before", 2), ("after temperature", "after", 1))
    ]
    caption = (
        f"How often the model's pick agrees with {what}, over how sure it is; larger dots hold more "
        "pairs. On the dashed line its confidence can be taken at its word. Expected calibration error "
        f"{numbers['before']['ece']:.3f} as trained, {numbers['after']['ece']:.3f} with a temperature of "
        f"about {numbers['temperature']:.2f}, fitted on the other half of the pairs."
    )
    svg = reliability(curves, "confidence of the reward model", "accuracy", "Reliability of the reward model")
    legend = [(name, colour) for name, _, colour in curves]
    margins = numbers["margin_histogram"]
    margin_svg = histogram(
        margins["counts"], margins["edges"], "score margin", "pairs", "Margins on held-out pairs"
    )
    return [
        Figure("Reliability of the reward model", svg, caption, legend),
        Figure(
            "Margins on held-out pairs",
            margin_svg,
            f"Score of {winner} less the other's; left of 0 is a mistake.",
        ),
    ]


def timing_figure(stages: Iterable[Stage]) -> Figure | None:
    """Seconds of every stage by phase; what no phase accounts for is shown as `other`."""
    rows = []
    names: list[str] = []
    for stage in stages:
        timings = {name: float(value) for name, value in stage.manifest.get("timings", {}).items()}
        total = timings.pop("total", sum(timings.values()))
        phases: dict[str, float] = {}
        for name, seconds in timings.items():
            phases[name.split(".")[0]] = phases.get(name.split(".")[0], 0.0) + seconds
        other = total - sum(phases.values())
        if other > 0.005 * total:
            phases["other"] = other
        names += [name for name in phases if name not in names]
        if phases:
            rows.append((stage.name, phases))
    if not rows:
        return None
    spent = {name: sum(phases.get(name, 0.0) for _, phases in rows) for name in names}
    shown = sorted((name for name in names if name != "other"), key=lambda name: -spent[name])[:5]
    palette = {name: 1 + index for index, name in enumerate(shown)}
    bars = []
    for stage_name, phases in rows:
        rest = sum(seconds for name, seconds in phases.items() if name not in palette)
        parts = [(name, phases[name], palette[name]) for name in shown if name in phases]
        bars.append((stage_name, [*parts, ("other", rest, 0)] if rest else parts))
    svg = stacked_bars(bars, "seconds", "Seconds by stage and phase")
    legend = [*palette.items(), ("other", 0)]
    return Figure("Where the time went", svg, "Wall-clock seconds per stage, by phase.", legend, wide=True)
