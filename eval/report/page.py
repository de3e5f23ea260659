"""What the page says in words and tables: verdicts, headline, stages, seeds, samples, environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from eval.report.lineage import output_hash
from eval.report.load import Pipeline, Stage, is_number
from posttrain.svg import number

SAMPLES_PER_GROUP = 4
SHOWN_METRICS = 6
COUNTS = ("bars", "bars_passed")
BAR_NAMES = {
    "min_rm_accuracy": "Reward model agrees with gold",
    "require_gain": "Score clearly above the baseline",
    "min_win_rate": "Wins against the baseline",
    "kl_target": "Stays near the reference",
}


@dataclass(frozen=True)
class Verdict:
    """One bar over all runs: values and outcomes in the order of the runs, None where a run lacks it."""

    title: str
    detail: str
    bound: str
    values: list[float | None]
    outcomes: list[bool | None]

    @property
    def passed(self) -> bool:
        return all(self.outcomes) and bool(self.outcomes)


def results_of(pipeline: Pipeline) -> dict[str, Any] | None:
    """eval.json of the pipeline's last eval stage."""
    stage = pipeline.with_file("eval")
    return stage.files["eval"] if stage is not None else None


def collect_verdicts(pipelines: Sequence[Pipeline]) -> list[Verdict]:
    """Every bar of every run, merged by bar and model, and the serving parity proof."""
    keys: dict[tuple[str, str | None], dict[str, Any]] = {}
    per_run: list[dict[tuple[str, str | None], dict[str, Any]]] = []
    for pipeline in pipelines:
        results = results_of(pipeline)
        found = {(v["bar"], v["model"]): v for v in results["verdicts"]} if results is not None else {}
        per_run.append(found)
        for key, verdict in found.items():
            keys.setdefault(key, verdict)
    verdicts = []
    for key, first in keys.items():
        rows = [found.get(key) for found in per_run]
        bound = f"{'under' if first['bar'] == 'kl_target' else 'at least'} {number(first['bound'])}"
        if first["bar"] == "require_gain":
            bound = "above the baseline's interval"
        title = BAR_NAMES.get(first["bar"], first["bar"])
        values = [row["value"] if row else None for row in rows]
        verdicts.append(
            Verdict(
                f"{title}: {first['model']}" if first["model"] else title,
                first["what"],
                bound,
                values,
                [row["passed"] if row else None for row in rows],
            )
        )
    parity = [pipeline.with_file("parity") for pipeline in pipelines]
    outcomes = [stage.files["parity"].get("passed") if stage is not None else None for stage in parity]
    if any(outcome is not None for outcome in outcomes):
        verdicts.append(
            Verdict(
                "What is served is what was trained",
                "parity proof of the export",
                "proof holds",
                [None] * len(parity),
                outcomes,
            )
        )
    return verdicts


def interval_text(interval: dict[str, Any]) -> str:
    """`0.91 (0.89 to 0.93)`."""
    return f"{interval['value']:.3g} ({interval['low']:.3g} to {interval['high']:.3g})"


def headline(results: dict[str, Any] | None) -> list[str]:
    """What happened, a sentence per compared model, from the most trusted judge there is."""
    if results is None:
        return []
    sentences = []
    baseline = results["baseline"]
    for name, model in results["models"].items():
        judge = next((judge for judge in ("gold", "rm") if f"{judge}_win_rate" in model), None)
        if judge is None:
            continue
        what = "the gold rubric" if judge == "gold" else "the reward model"
        sentence = (
            f"{name} scores {interval_text(model[judge])} on {what}, {baseline} "
            f"{interval_text(results['models'][baseline][judge])}; it wins "
            f"{model[f'{judge}_win_rate']['value']:.0%} of {model[judge]['n']} held-out prompts"
        )
        if "kl_k1" in model:
            sentence += f", {number(model['kl_k1']['value'])} nats from the reference"
        sentences.append(sentence + ".")
    reward = results["reward_model"]
    if reward is not None:
        against = "gold" if reward["gold"] is not None else "labels"
        accuracy = reward[against]["accuracy"]
        what = "the noiseless gold winner" if against == "gold" else "the preferred answer"
        sentences.append(
            f"The reward model picks {what} in {accuracy['value']:.1%} of {accuracy['n']} held-out pairs."
        )
    return sentences


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 5 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stage_rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One row per stage, planned stages that have not run included."""
    by_name = {stage.name: stage for stage in pipeline.stages}
    rows: list[dict[str, Any]] = []
    for name in [*pipeline.planned, *(name for name in by_name if name not in pipeline.planned)]:
        stage = by_name.get(name)
        if stage is None:
            rows.append(
                {
                    "name": name,
                    "kind": "",
                    "status": "not run",
                    "time": "",
                    "digest": "",
                    "metrics": [],
                    "more": [],
                }
            )
            continue
        metrics = [
            (key, scalar(value)) for key, value in stage.manifest.get("metrics", {}).items() if scalar(value)
        ]
        rows.append(
            {
                "name": name,
                "kind": stage.kind,
                "status": stage.status,
                "time": duration(total_seconds(stage)) if total_seconds(stage) else "",
                "digest": output_hash(stage)[:10],
                "metrics": metrics[:SHOWN_METRICS],
                "more": metrics[SHOWN_METRICS:],
            }
        )
    return rows


def scalar(value: Any) -> str:
    """A number, string or flag as text; empty for anything nested."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return number(float(value)) if isinstance(value, float) else f"{value:,}"
    return value if isinstance(value, str) and len(value) <= 60 else ""


def total_seconds(stage: Stage) -> float:
    timings = stage.manifest.get("timings", {})
    return float(timings.get("total", sum(timings.values())))


def seed_rows(pipelines: Sequence[Pipeline]) -> list[dict[str, Any]]:
    """Headline numbers of the eval stage, one column per run, with mean and standard deviation."""
    stages = [pipeline.with_file("eval") for pipeline in pipelines]
    columns = [stage.manifest.get("metrics", {}) if stage is not None else {} for stage in stages]
    names = dict.fromkeys(name for column in columns for name in column if name not in COUNTS)
    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    rows = []
    for name in sorted(names, key=lambda name: kinds.index(name.split("/")[0])):
        values = [float(c[name]) if is_number(c.get(name)) else None for c in columns]
        known = [value for value in values if value is not None]
        if known:
            spread = stdev(known) if len(known) > 1 else None
            rows.append(
                {
                    "name": name.replace("_", " ").replace("/", ": "),
                    "values": values,
                    "mean": fmean(known),
                    "sd": spread,
                }
            )
    return rows


def sample_groups(stage: Stage | None) -> list[dict[str, Any]]:
    """Dialogues worth reading: largest gains, typical ones and losses, best model against baseline."""
    if stage is None or not stage.samples:
        return []
    results, rows = stage.files["eval"], stage.samples
    names = list(results["models"])
    judge = next((judge for judge in ("gold", "rm") if judge in rows[0]["answers"][names[0]]), None)
    if judge is None or len(names) < 2:
        return [{"title": "Held-out prompts", "samples": rows[: 3 * SAMPLES_PER_GROUP], "judge": judge}]
    baseline = results["baseline"]
    best = max(
        (name for name in names if name != baseline), key=lambda name: results["models"][name][judge]["value"]
    )

    def gain(row: dict[str, Any]) -> float:
        return row["answers"][best][judge] - row["answers"][baseline][judge]

    order = sorted(range(len(rows)), key=lambda i: (-gain(rows[i]), i))
    n, middle = SAMPLES_PER_GROUP, len(rows) // 2
    top, typical = order[:n], [i for i in order[middle - n // 2 : middle + n // 2] if i not in order[:n]]
    losses = [i for i in reversed(order) if gain(rows[i]) < 0 and i not in top + typical][:n]
    groups = [
        (f"Largest gains of {best} over {baseline}", top),
        ("Around the median", typical),
        (f"Where {best} does worse than {baseline}", losses),
    ]
    return [
        {"title": title, "samples": [rows[i] for i in chosen], "judge": judge}
        for title, chosen in groups
        if chosen
    ]


def environment_rows(pipeline: Pipeline) -> list[tuple[str, str]]:
    """Code, machine and packages; values that differ between stages are all listed."""
    values: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        text = str(value)
        if value not in (None, "", []) and text not in values.setdefault(name, []):
            values[name].append(text)

    for stage in pipeline.stages:
        code = stage.manifest.get("code", {})
        commit = str(code.get("git") or "")[:12]
        dirty = " with uncommitted changes" if code.get("dirty") else ""
        add("posttrain", f"{code.get('version', '')} {commit}{dirty}".strip())
        hardware = stage.manifest.get("hardware", {})
        add("platform", hardware.get("platform"))
        add("CPU cores", hardware.get("cpus"))
        memory = hardware.get("memory_bytes")
        add("memory", f"{memory / 2**30:.0f} GiB" if memory else None)
        add("GPUs", ", ".join(hardware.get("gpus") or []))
        for package, version in stage.manifest.get("packages", {}).items():
            add(package, version)
    return [(name, ", ".join(found)) for name, found in values.items() if found]
