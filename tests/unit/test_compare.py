"""`posttrain compare`: figures against hand arithmetic and other libraries, the page, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_runs import finish_again, write_eval_run
from scipy import stats
from typer.testing import CliRunner

from eval.compare.command import Settings, compare, write_page
from posttrain.cli import app
from posttrain.errors import DataError, UserError

QUICK = Settings(samples=200)


def rows_of(figures: dict[str, Any], key: str = "metrics") -> dict[str, Any]:
    return {row["metric"] if key == "metrics" else (row["slice"], row["metric"]): row for row in figures[key]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """B is better than A by 0.2 on source a, and worse by 0.3 on source b."""
    place = tmp_path_factory.mktemp("runs")
    a = np.clip(np.random.default_rng(0).uniform(0.3, 0.7, 80), 0, 1)
    b = a + np.where(np.arange(80) % 2 == 0, 0.2, -0.3)
    return write_eval_run(place / "a", {"ppo": a, "sft": a}), write_eval_run(place / "b", {"ppo": b})


def test_differences_are_paired_and_tested(runs: tuple[Path, Path]) -> None:
    figures = compare(*runs, QUICK).figures
    rows = rows_of(figures)
    assert set(rows) == {"finished", "tokens", "gold", "rm", "gold_parts/polite"}
    gold = rows["gold"]
    assert gold["b"] - gold["a"] == pytest.approx(gold["difference"]["value"]) == pytest.approx(-0.05)
    assert gold["difference"]["low"] < -0.05 < gold["difference"]["high"]
    samples = [
        [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in runs
    ]
    finished = [np.array([row["answers"]["ppo"]["finished"] for row in some]) for some in samples]
    up, down = (finished[1] & ~finished[0]).sum(), (finished[0] & ~finished[1]).sum()
    assert rows["finished"]["test"] == "mcnemar-exact"
    assert rows["finished"]["p_value"] == pytest.approx(stats.binomtest(min(up, down), up + down).pvalue)
    assert rows["tokens"]["verdict"] == "no difference"
    assert rows["tokens"]["p_value"] == 1.0


def test_the_p_values_of_a_table_are_corrected_together(runs: tuple[Path, Path]) -> None:
    from statsmodels.stats.multitest import multipletests

    for correction, name in (("holm", "holm"), ("bh", "fdr_bh")):
        figures = compare(*runs, Settings(correction=correction, samples=200)).figures
        for table in ("metrics", "slices"):
            rows = figures[table]
            expected = multipletests([row["p_value"] for row in rows], method=name)[1]
            assert [row["adjusted_p"] for row in rows] == pytest.approx(expected.tolist())


def test_a_slice_that_got_worse_is_found(runs: tuple[Path, Path]) -> None:
    slices = rows_of(compare(*runs, QUICK).figures, "slices")
    assert slices["source=a", "gold"]["verdict"] == "better"
    worse = slices["source=b", "gold"]
    assert (worse["verdict"], worse["n"]) == ("worse", 40)
    assert worse["difference"]["value"] == pytest.approx(-0.3)
    assert {name.split("=")[0] for name, _ in slices} >= {"source", "meta.kind", "prompt length"}


def test_different_prompts_are_refused_with_their_overlap(tmp_path: Path) -> None:
    a = write_eval_run(tmp_path / "a", {"ppo": [0.1] * 20})
    b = write_eval_run(tmp_path / "b", {"ppo": [0.2] * 20}, first_id=5)
    with pytest.raises(DataError, match="has 20; 0 are the same; 15 ids .* first is p5"):
        compare(a, b, QUICK)
    result = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert result.exit_code == 2


def test_models_are_matched_by_name_or_as_told(runs: tuple[Path, Path], tmp_path: Path) -> None:
    figures = compare(runs[0], runs[0], Settings(models=["sft=ppo"], samples=200)).figures
    assert {row["verdict"] for row in figures["metrics"]} == {"no difference"}
    assert figures["texts"][0]["model"] == "sft -> ppo"
    twice = compare(*runs, Settings(models=["ppo", "ppo=ppo"], samples=200)).figures
    assert len(twice["texts"]) == 1
    with pytest.raises(UserError, match="every model equals itself"):
        compare(runs[0], runs[0], QUICK)
    with pytest.raises(UserError, match="--model dpo: .* has no 'dpo'; it has ppo, sft"):
        compare(*runs, Settings(models=["dpo"]))
    with pytest.raises(UserError, match="is a judge run"):
        compare(write_eval_run(tmp_path / "j", {"x": [1.0]}, stage="judge"), runs[1], QUICK)


def test_decontamination_of_the_training_data_stands_beside_the_scores(tmp_path: Path) -> None:
    """Followed through the model to the data it was trained on."""
    for name, operations in (
        (
            "clean",
            [{"op": "decontaminate", "settings": {"against": ["gsm8k"]}, "drops": {"contaminated_ngram": 3}}],
        ),
        ("raw", []),
    ):
        data, model = tmp_path / name, tmp_path / f"{name}-model"
        data.mkdir()
        (data / "dataset.json").write_text(json.dumps({"kind": "conversation", "operations": operations}))
        model.mkdir()
        parents = [{"field": "data", "ref": str(data)}]
        (model / "manifest.json").write_text(json.dumps({"schema_version": 1, "parents": parents}))
    runs = []
    for name in ("clean", "raw"):
        parent = {"field": "models.ppo", "ref": str(tmp_path / f"{name}-model")}
        runs.append(write_eval_run(tmp_path / f"run-{name}", {"ppo": [0.1, 0.9] * 10}, parents=[parent]))
    flags = compare(*runs, QUICK).figures["contamination"]["ppo"]
    assert flags["a"] == {
        "status": "checked",
        "data": [{"data": "clean", "decontaminated": True, "against": ["gsm8k"], "dropped": 3}],
    }
    assert flags["b"]["status"] == "unchecked"


def rewrite(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """The run with its samples changed."""
    file = run / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return finish_again(run)


def test_a_metric_that_one_answer_lacks_is_left_out_and_named(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """NaN, null and a metric of one run alone: no mean of the rest that would look like all."""

    def change(rows: list[dict[str, Any]]) -> None:
        rows[3]["answers"]["ppo"]["gold"] = float("nan")
        rows[4]["answers"]["ppo"]["rm"] = None
        for row in rows:
            row["answers"]["ppo"]["extra"] = 1

    b = rewrite(write_eval_run(tmp_path / "b", {"ppo": [0.5] * 80}), change)
    compared = compare(runs[0], b, QUICK)
    assert set(rows_of(compared.figures)) == {"finished", "tokens", "gold_parts/polite"}
    reasons = {row["metric"]: row["reason"] for row in compared.figures["left_out"]}
    assert reasons == {
        "gold": "B has it for 79 of 80 answers",
        "rm": "B has it for 79 of 80 answers",
        "extra": "A has it for 0 of 80 answers",
    }
    write_page(compared, tmp_path / "page.html")
    assert "gold is not compared, B has it for 79 of 80 answers" in (tmp_path / "page.html").read_text()
    shown = CliRunner().invoke(app, ["compare", str(runs[0]), str(b)])
    assert "ppo: gold is not compared, B has it for 79 of 80 answers" in shown.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.append(rows[2]), "samples.jsonl:21: prompt p2 is there twice"),
        (lambda rows: rows[1].pop("prompt"), "samples.jsonl:2: is no line of an eval run"),
        (lambda rows: rows[1]["answers"].pop("ppo"), "samples.jsonl:2: has no answer of ppo"),
        (lambda rows: rows[1]["answers"]["ppo"].pop("text"), "samples.jsonl:2: has no answer of ppo"),
        (lambda rows: rows[1].pop("id"), "samples.jsonl:2: is no line of an eval run"),
        (lambda rows: rows.pop(1), "has 20 prompts and .* has 19; 19 are the same"),
    ],
)
def test_samples_that_cannot_be_paired_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    a = write_eval_run(tmp_path / "a", {"ppo": [0.1] * 20})
    b = rewrite(write_eval_run(tmp_path / "b", {"ppo": [0.2] * 20}), change)
    with pytest.raises(DataError, match=message):
        compare(a, b, QUICK)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_prompts_show_nothing_but_are_compared(count: int, tmp_path: Path) -> None:
    a = write_eval_run(tmp_path / "a", {"ppo": [0.1] * count})
    b = write_eval_run(tmp_path / "b", {"ppo": [0.9] * count})
    figures = compare(a, b, QUICK).figures
    assert {row["verdict"] for row in figures["metrics"]} == {"no difference"}
    write_page(compare(a, b, QUICK), tmp_path / "page.html")


def test_runs_without_any_difference_have_none(tmp_path: Path) -> None:
    a, b = (write_eval_run(tmp_path / name, {"ppo": [0.1, 0.7] * 20}) for name in "ab")
    figures = compare(a, b, QUICK).figures
    assert {(row["p_value"], row["verdict"]) for row in figures["metrics"]} == {(1.0, "no difference")}


def test_the_page_escapes_what_models_say_and_allows_only_its_script(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    b = write_eval_run(tmp_path / "b", {"ppo": [0.5] * 80}, texts={3: attack})
    page = tmp_path / "compare.html"
    write_page(compare(runs[0], b, QUICK), page)
    text = page.read_text()
    assert attack not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1
    import base64
    import hashlib

    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert text.count("<details data-gain") == 80


def test_the_command_prints_json(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--json", "--html", str(page)])
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert figures["prompts"] == 80
    assert page.is_file()
    plain = CliRunner().invoke(app, ["compare", *map(str, runs)])
    assert plain.exit_code == 0
    assert "Slices that got worse" in plain.stdout


def test_the_browser_of_samples_filters_and_sorts(
    browser: Any, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """In Chromium: what a model wrote does not run, the page's own script does."""
    gold = [json.loads(line)["answers"]["ppo"]["gold"] for line in (runs[1] / "samples.jsonl").open()]
    b = write_eval_run(tmp_path / "b", {"ppo": gold}, texts={3: "<script>window.hacked = 1</script>"})
    write_page(compare(runs[0], b, QUICK), tmp_path / "page.html")
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.inner_text("#shown") == "80 of 80"
    page.select_option("#which", "worse")
    assert page.inner_text("#shown") == "40 of 80"
    page.select_option("#slice", "source=a")
    assert page.inner_text("#shown") == "0 of 80"
    page.select_option("#which", "all")
    page.fill("#text", "question 4?")
    assert page.inner_text("#shown") == "1 of 80"
    page.fill("#text", "")
    page.select_option("#slice", "")
    page.select_option("#sort", "gain")
    gains = page.evaluate("Array.from(document.querySelectorAll('#list details'), row => +row.dataset.gain)")
    assert gains == sorted(gains, reverse=True)
    assert page.evaluate("window.hacked") is None
    page.close()
    assert problems == []
