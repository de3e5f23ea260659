"""The page, figure and tables of `scripts/overoptimisation.py`, from run directories made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
RUNS = {"ppo-150": "ppo", "ppo-150-penalty": "penalty", "ppo-600": "ppo"}
PARTS = ("answers", "polite")


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def metrics(end: float) -> list[dict]:
    """Twenty updates: KL grows by one nat each, proxy by 0.1, and gold turns at the tenth towards `end`."""
    rise = [0.8 + 0.01 * i for i in range(10)]
    fall = [rise[-1] + (end - rise[-1]) * (i + 1) / 10 for i in range(10)]
    return [
        {"step": i + 1, "kl": float(i), "score": 0.1 * i, "reward/gold": gold}
        for i, gold in enumerate([*rise, *fall])
    ]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """What the stages leave: gold ends at 0.6, or under the penalty at 0.9."""
    runs = tmp_path / "tiny-over-optimisation"
    for name in ("150", "600"):
        (runs / f"reward-{name}").mkdir(parents=True)
        manifest = {"metrics": {"train_pairs": int(name)}}
        (runs / f"reward-{name}" / "manifest.json").write_text(json.dumps(manifest))
        model = {
            "gold": {"value": 0.75},
            "gold_parts": {part: {"value": 0.5} for part in PARTS},
            "tokens": {"value": 20.0},
        }
        report = {
            "baseline": "sft",
            "models": {"sft": model, "ppo": model, "penalty": model},
            "reward_model": {"gold": {"accuracy": {"value": int(name) / 1000}}},
        }
        (runs / f"eval-{name}").mkdir()
        (runs / f"eval-{name}" / "eval.json").write_text(json.dumps(report))
    for name in RUNS:
        (runs / name).mkdir()
        penalised = name.endswith("penalty")
        (runs / name / "metrics.jsonl").write_text(lines(metrics(0.9 if penalised else 0.6)))
        prompt = "<|im_start|>user\nWhere is <b>A1</b>?<|im_end|>\n<|im_start|>assistant\n"
        said = [
            {"step": step, "prompt": prompt, "response": f"Have a nice day {step}.<|im_end|>", "score": 1.5}
            for step in (5, 10, 20)
        ]
        (runs / name / "samples.jsonl").write_text(lines(said))
    warning = {"step": 17, "kind": "over_optimisation", "message": "gold fell"}
    (runs / "ppo-600" / "warnings.jsonl").write_text(lines([{**warning, "kind": "clip_fraction"}, warning]))
    return tmp_path


def test_the_page_the_figure_and_the_tables(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    import overoptimisation

    figure = experiment / "copy.svg"
    command = ["overoptimisation.py", "--no-run", "--output-dir", str(experiment), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", command)
    assert overoptimisation.main() == 0

    runs = experiment / "tiny-over-optimisation"
    table = (runs / "over-optimisation.md").read_text()
    assert table in capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    by_label = {row[0]: row for row in cells[2:5]}
    # Means over five updates: KL 0..4 and proxy 0..0.4 first, KL 15..19 and proxy 1.5..1.9 last. Gold is 0.80
    # to 0.84 first and 0.89 less 0.174, 0.203, 0.232, 0.261, 0.29 last; its best five are at KL 6..10.
    mean_peak = (0.86 + 0.87 + 0.88 + 0.89 + 0.861) / 5
    peak = [f"{mean_peak:.3f}", f"{0.89 - 0.232:.3f}"]
    expected = ["150 pairs", "0.150", "8.0", "17.0", "0.820", *peak, "0.20", "0.80", "1.70", "-"]
    assert by_label["150 pairs"] == expected
    assert by_label["600 pairs"][1] == "0.600"
    assert by_label["600 pairs"][-1] == "17"
    assert (
        by_label["150 pairs, KL penalty"][6] == f"{(5 * 0.89 + 0.01 * (0.6 + 0.7 + 0.8 + 0.9 + 1)) / 5:.3f}"
    )

    drawn = ElementTree.fromstring(figure.read_text())
    name = "{http://www.w3.org/2000/svg}"
    assert figure.read_text() == (runs / "over-optimisation.svg").read_text()
    assert len(drawn.findall(f"{name}g")) == 2
    dots = [node for node in drawn.iter(f"{name}circle") if node.get("r") == "1.6"]
    assert len(dots) == 2 * len(RUNS) * 20

    page = (runs / "over-optimisation.html").read_text()
    assert "<script" not in page
    assert "http://" not in page
    assert "Where is &lt;b&gt;A1&lt;/b&gt;?" in page
    assert "Have a nice day 5." in page
    assert "Have a nice day 20." in page
    assert "Have a nice day 10." not in page
    assert "150 pairs: gold goes from 0.82 to" in page


def test_a_run_that_is_missing_is_named(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    import overoptimisation

    (experiment / "tiny-over-optimisation" / "eval-600" / "eval.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"eval-600/eval\.json"):
        overoptimisation.read_results(overoptimisation.EXPERIMENT, [f"output_dir={experiment}"])
