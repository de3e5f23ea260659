"""report.html of a curated data set in headless Chromium: every plot, hostile data, no script, no network."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import CurateConfig
from tests.integration.test_curate import save
from tests.integration.test_curate_operations import curate

HOSTILE = (
    "</script></style><img src=x onerror=\"document.title='hacked'\"><script>document.title='x'</script>"
)
WORDS = (
    "the kettle was sent back to our shop because its lid did not close and water ran over the table "
    "so we would like to have another one or our money please and thank you for a quick answer"
).split()
GERMAN = "Der Wasserkocher schliesst nicht mehr richtig, deshalb senden wir ihn an Sie zurück. Nummer"


def pair(draw: random.Random, number: int) -> dict[str, Any]:
    def said(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    prompt = f"{GERMAN} {number}: {said(3, 6)}" if number % 5 == 0 else f"{said(12, 30)} {number}"
    long = int(draw.lognormvariate(3, 1.2)) + 3
    answer = (
        f"{said(8, long + 9)} mail to m{number}@shop.example.org" if number % 7 == 0 else said(8, long + 9)
    )
    return {"prompt": prompt, "chosen": answer, "rejected": f"no, {said(5, 25)}"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder, draw = tmp_path_factory.mktemp("page"), random.Random(4)
    shop = [pair(draw, n) for n in range(260)]
    shop += [{**at, "prompt": f"{at['prompt']} please"} for at in shop[:40] for _ in range(1 + len(at) % 2)]
    shop += [{**shop[1], "prompt": f"{shop[1]['prompt']} {'again ' * n}"} for n in range(4)]
    hostile = [
        {**pair(draw, 1000 + n), "chosen": f"{HOSTILE} {n} {pair(draw, n)['chosen']}"} for n in range(60)
    ]
    save(folder / "exam.jsonl", [{"question": shop[11]["prompt"]}, {"question": shop[12]["prompt"]}])
    operations = [
        {"op": "language"},
        {"op": "pii", "action": "redact"},
        {"op": "near_duplicates", "part": "prompt"},
        {"op": "decontaminate", "against": [str(folder / "exam.jsonl")], "part": "prompt"},
        {"op": "preference_checks"},
        {"op": "length", "tokenizer": str(tiny_model_dir), "tag": True},
        {"op": "mix", "weights": {"shop": 3, "hostile": 1}},
    ]
    sources = [
        {"path": save(folder / "shop.jsonl", shop), "name": "shop"},
        {"path": save(folder / "<i onclick=alert(1)>.jsonl", hostile), "name": "hostile"},
    ]
    block = {"kind": "preference", "sources": sources, "operations": operations}
    curate(CurateConfig.model_validate(block), folder / "out")
    return folder / "out"


def test_every_plot_and_nothing_of_the_data_runs(directory: Path, browser: Any, tmp_path: Path) -> None:
    page_file = directory / "report.html"
    text = page_file.read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "<i onclick" not in text
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    console: list[str] = []
    urls: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(page_file.as_uri())
    assert page.title() == "Data set: preference"
    drawn = [
        str(each.get_attribute("aria-label")) for each in page.get_by_role("img").all() if each.is_visible()
    ]
    assert set(drawn) == {
        "rows left after each step",
        "share of each source by side",
        "clusters of near_duplicates by size",
        "largest clusters of near_duplicates",
        "rows flagged against exam.jsonl",
        "rows by length of prompt",
        "rows by length of chosen",
        "rows by length of rejected",
        "rows by length of whole row",
        "pairs by length of chosen less that of rejected",
        "rows by language",
        "personal data by type",
    }
    samples = page.locator("article")
    whole = samples.count()
    assert samples.filter(visible=True).count() == whole == 9
    page.get_by_role("radio", name="<i onclick=alert(1)>.jsonl").check()
    left = samples.filter(visible=True)
    assert 0 < left.count() < whole
    assert HOSTILE in left.first.inner_text()
    page.get_by_label("all sources").check()
    assert samples.filter(visible=True).count() == whole
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1100
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    assert colours[0] != colours[1]
    page.close()
    assert console == []
    assert urls == [page_file.as_uri()]
