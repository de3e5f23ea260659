"""`posttrain annotate serve` as a process: kills without loss, and two annotators at once in Chromium."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.annotate import votes
from eval.annotate.database import Database
from eval.annotate.store import Study, add_annotator, create_study, open_study
from eval.annotate.study import StudyConfig, load_items

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_annotate import Server, is_right, measure, private_postgres

MARKUP = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def test_no_vote_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    result = measure(str(tmp_path / "study.db"), tmp_path, items=6, annotators=3, kills=1)
    assert is_right(result), result
    assert result["kills"] == 1


@pytest.mark.slow
def test_two_thousand_votes_and_three_kills_on_both_databases(tmp_path: Path) -> None:
    results = [measure(str(tmp_path / "study.db"), tmp_path, items=250, annotators=8, kills=3)]
    try:
        with private_postgres() as url:
            results.append(measure(url, tmp_path, items=250, annotators=8, kills=3))
    except RuntimeError as error:
        pytest.skip(f"SQLite alone was right: {is_right(results[0])}; {error}")
    assert all(map(is_right, results)), results
    assert [result["votes"] for result in results] == [2000, 2000]
    assert len({result["export_sha256"] for result in results}) == 1


class Served:
    """A study of four items with two votes each, its tokens, and its server."""

    def __init__(self, folder: Path) -> None:
        rows = [
            {
                "id": f"q{n}",
                "prompt": f"Question {n}? {MARKUP}",
                "answers": {"aardvark-7b": f"Left {n} {MARKUP}", "zebra-70b": f"Right {n}\n\n    indented"},
            }
            for n in range(4)
        ]
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = StudyConfig(
            name="two-at-once", items=str(folder / "items.jsonl"), overlap=2, criteria=["helpful", "correct"]
        )
        self.database = Database(str(folder / "study.db"))
        create_study(self.database, config, load_items(config))
        self.study: Study = open_study(self.database)
        people = (("ann", "annotator"), ("bob", "annotator"), ("root", "admin"))
        self.tokens = {name: add_annotator(self.database, self.study, name, role) for name, role in people}
        self.server = Server(str(folder / "study.db"))
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.console: list[str] = []

    def votes(self) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            return votes.standing_votes(session, self.study)

    def open(self, browser: Any, name: str, **options: Any) -> Any:
        """A page of somebody's own browser, logged in."""
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.goto(self.url)
        page.get_by_label("Token").fill(self.tokens[name])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{self.url}/{'admin' if name == 'root' else ''}")
        return page


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.database.close()
    assert made.server.stop() == 0


def nonce(page: Any) -> str:
    return page.locator("#vote input[name=nonce]").get_attribute("value")


def press(page: Any, key: str) -> None:
    """Press a key that sends the form, and wait for the next page."""
    page.locator("#vote[data-ready], main:not(:has(#vote))").wait_for()
    with page.expect_navigation():
        page.keyboard.press(key)


def test_two_annotators_at_once(browser: Any, served: Served) -> None:
    ann, bob = served.open(browser, "ann"), served.open(browser, "bob")
    for keys in (("1", "ArrowRight"), ("ArrowLeft", "2"), ("3", "ArrowUp"), ("4", "ArrowDown")):
        assert nonce(ann) != nonce(bob)
        for page, key in zip((ann, bob), keys, strict=True):
            assert page.title() == "two-at-once"
            assert page.locator(".answer").count() == 2
            assert page.locator("main img, main script").count() == 0
            press(page, key)
    for page in (ann, bob):
        assert "Nothing is left for you" in page.inner_text("main")
        assert "4 done" in page.inner_text("header")
    found = served.votes()
    assert len({(vote["item"], vote["annotator"]) for vote in found}) == 8
    given = {name: sorted(v["choice"] for v in found if v["annotator"] == name) for name in ("ann", "bob")}
    assert given == {"ann": ["a", "a", "both_bad", "tie"], "bob": ["b", "b", "both_bad", "tie"]}
    assert served.console == []
    admin = served.open(browser, "root")
    assert "8 of 8 votes" in admin.inner_text("main")
    assert "Krippendorff" in admin.inner_text("main")
    with admin.expect_download() as download:
        admin.get_by_role("button", name="Export").click()
    rows = Path(download.value.path()).read_text().splitlines()
    assert all({"prompt", "chosen", "rejected"} <= set(json.loads(row)) for row in rows)


def test_a_double_click_does_not_vote_on_the_next_item(browser: Any, served: Served) -> None:
    page = served.open(browser, "ann")
    page.locator("#vote[data-ready]").wait_for()
    first = nonce(page)
    page.clock.install(time=0)
    page.clock.pause_at(10)
    with page.expect_navigation():
        page.get_by_role("button", name="A is better").click()
    page.evaluate("document.querySelector('button[value=a]').click()")
    assert page.locator("#vote[data-ready]").count() == 0
    page.clock.run_for(1000)
    assert nonce(page) != first
    assert len(served.votes()) == 1
    press(page, "1")
    assert len(served.votes()) == 2


@pytest.mark.slow
def test_a_draft_survives_a_kill_and_undo_brings_it_back(browser: Any, served: Served) -> None:
    page = served.open(browser, "ann")
    page.keyboard.press("c")
    page.keyboard.type("1234 is typed, not voted")
    page.get_by_role("group", name="helpful").get_by_label("B").check()
    page.get_by_text("Draft saved").wait_for()
    assert served.votes() == []
    served.server.kill()
    served.server.start()
    page.reload()
    assert page.locator("#comment").input_value() == "1234 is typed, not voted"
    assert page.get_by_role("group", name="helpful").get_by_label("B").is_checked()
    press(page, "2")
    (vote,) = served.votes()
    assert vote["comment"] == "1234 is typed, not voted"
    # What stands as A and B is drawn; `ratings` name the stored answers.
    assert vote["ratings"] == {"helpful": vote["preferred"]}
    press(page, "u")
    assert served.votes() == []
    assert page.locator("#comment").input_value() == "1234 is typed, not voted"
    page.get_by_label("Skip, because").select_option("unclear")
    with page.expect_navigation():
        page.get_by_role("button", name="Skip").click()
    assert "0 of 3" in page.inner_text("header")


@pytest.mark.slow
def test_everything_works_without_scripts(browser: Any, served: Served) -> None:
    page = served.open(browser, "bob", java_script_enabled=False)
    page.get_by_label("Comment").fill("by hand")
    page.get_by_role("button", name="Save draft").click()
    assert page.get_by_label("Comment").input_value() == "by hand"
    page.get_by_role("button", name="Equally good").click()
    assert [(vote["choice"], vote["comment"]) for vote in served.votes()] == [("tie", "by hand")]
    page.get_by_role("button", name="Undo last").click()
    assert served.votes() == []
    page.get_by_role("button", name="Log out").click()
    assert page.get_by_label("Token").is_visible()
