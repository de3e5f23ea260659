"""The report page: complete, self-contained, safe against what models say, tolerant of gaps."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from eval.report import write_report
from eval.report.charts import MAX_POINTS, Line, interval_bars, line_chart, smooth, thin
from eval.report.lineage import build_graph, place
from eval.report.load import load_pipeline
from eval.report.page import collect_verdicts, duration
from eval.report.svg import nice_ticks, number
from posttrain.errors import DataError, UserError
from tests.integration.report_runs import PARENTS, write_pipeline

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Balance(HTMLParser):
    """Collects tags that are closed in the wrong order, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    return parser


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = write_report([pipeline], tmp_path_factory.mktemp("out") / "deep" / "report.html")
    return output.read_text(encoding="utf-8")


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    shutil.copytree(pipeline, tmp_path / "tiny")
    return tmp_path / "tiny"


def rendered(*runs: Path) -> str:
    return write_report(list(runs), runs[0].parent / "report.html").read_text(encoding="utf-8")


def test_every_section_is_there(page: str) -> None:
    ids = re.findall(r'<h[23] id="(\w+)"', page)
    expected = [
        "scores",
        "perplexity",
        "frontier",
        "reward",
        "samples",
        "curves",
        "stages",
        "lineage",
        "environment",
    ]
    assert ids == expected
    for title in (
        "Gold score",
        "Win rate against sft, by gold score",
        "Reward-model score against KL",
        "Reliability of the reward model",
        "Where the time went",
        "Largest gains of ppo over sft",
        "What is served is what was trained",
    ):
        assert title in page
    for stage in PARENTS:
        assert f">{stage}</th>" in page


def test_it_is_one_well_formed_page_that_loads_nothing(page: str) -> None:
    found = parsed(page)
    assert found.wrong == []
    assert found.open == []
    assert all(load.startswith("href=#") for load in found.loads)
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 2_000_000


def test_every_link_has_its_target(page: str) -> None:
    assert set(re.findall(r'href="#(\w+)"', page)) <= set(re.findall(r'id="(\w+)"', page))


def test_every_figure_is_valid_xml_with_a_name_and_finite_coordinates(page: str) -> None:
    figures = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(figures) > 20
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("aria-label")
        assert "nan" not in figure.replace("nanos", "")
        assert "inf" not in re.sub(r">[^<]*<", "><", figure)


def test_the_same_runs_give_the_same_bytes(pipeline: Path, tmp_path: Path) -> None:
    first = write_report([pipeline], tmp_path / "a.html").read_bytes()
    assert write_report([pipeline], tmp_path / "b.html").read_bytes() == first


def test_what_a_model_says_is_text(copy: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</details>"
    samples = [
        json.loads(line) for line in (copy / "eval/samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for sample in samples:
        sample["prompt"][-1]["content"] = attack
        for answer in sample["answers"].values():
            answer["text"] = attack
    (copy / "eval/samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    page = rendered(copy)
    assert attack not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    found = parsed(page)
    assert not {"script", "img"} & found.tags
    assert found.wrong == []


def test_names_from_the_run_are_text_in_figures_too(copy: Path) -> None:
    evil = "<em onload=x>&"
    (copy / "ppo").rename(copy / "p")
    manifest = json.loads((copy / "p/manifest.json").read_text(encoding="utf-8"))
    manifest["parents"][0] |= {"run": evil}
    (copy / "p/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (copy / "pipeline.json").write_text(json.dumps({"name": evil, "stages": list(PARENTS)}), encoding="utf-8")
    page = rendered(copy)
    assert evil not in page
    assert "em" not in parsed(page).tags
    assert "&lt;em onload=x&gt;&amp;" in page


def test_missing_stages_are_left_out(copy: Path) -> None:
    for stage in ("dpo", "ppo", "eval", "ppo-merged", "export"):
        shutil.rmtree(copy / stage)
    page = rendered(copy)
    assert re.findall(r'<h2 id="(\w+)"', page) == ["curves", "stages", "lineage", "environment"]
    assert page.count("<td>not run</td>") == 5
    assert "8 of 13 stages complete" in page


def test_a_single_stage_without_metrics_or_pipeline_file(copy: Path) -> None:
    (copy / "pipeline.json").unlink()
    for stage in list(PARENTS)[1:]:
        shutil.rmtree(copy / stage)
    page = rendered(copy)
    assert "1 of 1 stages complete" in page
    assert "<h1>tiny</h1>" in page


def test_a_failed_stage_shows_its_status_and_a_dashed_border(copy: Path) -> None:
    manifest = json.loads((copy / "ppo/manifest.json").read_text(encoding="utf-8"))
    (copy / "ppo/manifest.json").write_text(json.dumps(manifest | {"status": "failed"}), encoding="utf-8")
    page = rendered(copy)
    assert "<td>failed</td>" in page
    assert page.count('class="box dash"') == 1


def test_metrics_with_gaps_and_a_cut_last_line(copy: Path) -> None:
    rows = '{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n{"step": 3, "los'
    (copy / "sft/metrics.jsonl").write_text(rows, encoding="utf-8")
    assert load_pipeline(copy).first("sft").series("loss") == ([2.0], [1.5])
    rendered(copy)


def test_an_evaluation_of_the_reward_model_alone(copy: Path) -> None:
    path = copy / "eval/eval.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results |= {"models": {}, "baseline": None, "verdicts": [], "over_optimisation": {}}
    path.write_text(json.dumps(results), encoding="utf-8")
    (copy / "eval/samples.jsonl").write_text("", encoding="utf-8")
    assert re.findall(r'<h2 id="(\w+)"', rendered(copy))[0] == "reward"


def test_the_reward_model_in_parts(copy: Path) -> None:
    path = copy / "eval/eval.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    reward = results["reward_model"]
    page = rendered(copy)
    row = re.search(r'<th scope="row">pairs</th>(.*?)</tr>', page, flags=re.DOTALL)
    pairs = reward["gold"]["classification"]["pairs"]
    assert row is not None and f"{pairs['precision']:.3f}" in row.group(1)
    assert f"{pairs['confusion']['tp']:g}" in row.group(1)
    for title in ("surest 25 %", '<th scope="row">mail</th>', "Out of distribution: 300 pairs"):
        assert title in page
    assert f"{reward['out_of_distribution']['gold']['transferred']['ece']:.3f}" in page
    # An evaluation written before these numbers existed still has its page.
    for against in ("gold", "labels"):
        for name in ("classification", "by_confidence", "by_subset", "length_controlled"):
            del reward[against][name]
    del reward["out_of_distribution"]
    path.write_text(json.dumps(results), encoding="utf-8")
    older = rendered(copy)
    assert "Reliability of the reward model" in older and "surest" not in older


def test_several_seeds_get_a_table_and_thin_lines(tmp_path: Path) -> None:
    runs = [write_pipeline(tmp_path / f"seed-{seed}", seed) for seed in range(3)]
    page = rendered(*runs)
    assert "Over 3 runs" in page
    assert all(f'<th scope="col" class="n">seed-{seed}</th>' in page for seed in range(3))
    assert page.count("faint") > rendered(runs[0]).count("faint")
    metrics = [
        json.loads((run / "eval/manifest.json").read_text(encoding="utf-8"))["metrics"] for run in runs
    ]
    mean = sum(one["gold/ppo"] for one in metrics) / 3
    row = re.search(r'<th scope="row">gold: ppo</th>.*?</tr>', page, flags=re.DOTALL)
    assert row is not None
    assert f">{number(mean)}<" in row.group()


def test_a_bar_is_met_only_if_every_run_meets_it(tmp_path: Path) -> None:
    runs = [write_pipeline(tmp_path / f"seed-{seed}", seed) for seed in range(2)]
    path = runs[1] / "eval/eval.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    for verdict in results["verdicts"]:
        verdict["passed"] = verdict["bar"] != "kl_target"
    path.write_text(json.dumps(results), encoding="utf-8")
    found = {v.title: v for v in collect_verdicts([load_pipeline(run) for run in runs])}
    assert found["Stays near the reference: ppo"].outcomes == [True, False]
    assert not found["Stays near the reference: ppo"].passed
    assert found["Wins against the baseline: ppo"].passed


def test_a_run_without_an_evaluation_does_not_meet_the_bars(tmp_path: Path) -> None:
    runs = [write_pipeline(tmp_path / f"seed-{seed}", seed) for seed in range(2)]
    shutil.rmtree(runs[1] / "eval")
    verdicts = collect_verdicts([load_pipeline(run) for run in runs])
    assert not any(v.passed for v in verdicts if v.title.startswith("Wins"))
    assert "not run" in rendered(*runs)


def test_lineage_puts_every_stage_below_its_inputs_and_none_on_another(pipeline: Path) -> None:
    nodes, edges = build_graph(load_pipeline(pipeline))
    place(nodes, edges)
    assert set(edges) == {(parent, stage) for stage, parents in PARENTS.items() for parent in parents}
    assert all(nodes[source].layer < nodes[target].layer for source, target in edges)
    places = sorted((node.layer, node.column) for node in nodes.values())
    for (layer, column), (next_layer, next_column) in pairwise(places):
        assert layer != next_layer or next_column - column >= 1 - 1e-9


def test_errors_name_the_place(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no stage has run here"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    (copy / "eval/eval.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"eval\.json: not valid JSON"):
        write_report([copy], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 9.3, [0, 2.5, 5, 7.5, 10]), (-0.3, 0.2, [-0.4, -0.2, 0, 0.2])],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_a_constant() -> None:
    ticks = nice_ticks(0.8, 0.8)
    assert ticks[0] < 0.8 < ticks[-1]
    assert nice_ticks(0, 0)[0] < 0 < nice_ticks(0, 0)[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.8333333, "0.833"), (12345, "12.3k"), (1234.5, "1234"), (2.1e-6, "2.1e-06"), (-3, "-3")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14, "3.1 s"), (59, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_thinning_keeps_the_mean_and_the_last_point() -> None:
    x = [float(i) for i in range(5001)]
    points = thin(x, x)
    assert len(points) <= MAX_POINTS
    assert points[-1] == (5000.0, 5000.0)
    assert all(px == pytest.approx(py) for px, py in points)


def test_smoothing_by_hand() -> None:
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]


def test_a_bar_starts_at_zero_and_ends_at_its_value() -> None:
    from eval.report.charts import Bar

    figure = ElementTree.fromstring(
        interval_bars([Bar("a", 0.5, 0.4, 0.6), Bar("b", 1.0, 0.9, 1.0)], "x", "name")
    )
    widths = [float(one.get("width", "0")) for one in figure.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_one_logged_point_is_still_a_chart() -> None:
    ElementTree.fromstring(line_chart([Line("loss", [5.0], [0.7])], "step", "loss", "name"))
