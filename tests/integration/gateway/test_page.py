"""The web page in headless Chromium, in front of the real gateway, Triton and models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.gateway.test_votes import rows

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
MARKUP = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
QUESTION = "Where is my order?"
CHAT = "/v1/chat/completions"
STOP_AT_THE_FIRST_TOKEN = """() => new MutationObserver(() => {
    if (document.querySelector(".writing .text")?.textContent) document.getElementById("stop").click();
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""


class Visit:
    """A visitor's page, and what went over the wire and into the console."""

    def __init__(self, browser: Any, gateway: Any, **options: Any) -> None:
        self.origin = gateway.url.removesuffix("/v1")
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.console: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.urls: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", self._note)
        self.ids: list[str] = []
        self.page.on("response", lambda response: self.ids.append(response.headers.get("x-request-id", "")))

    def _note(self, request: Any) -> None:
        self.urls.append(request.url)
        if request.method == "POST":
            self.bodies.append({"path": urlsplit(request.url).path, **request.post_data_json})

    def open(self, key: str = "pt-alice") -> Any:
        self.page.goto(self.origin)
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Connect").click()
        return self.page

    def choose(self, model: str) -> None:
        self.page.get_by_label("Model", exact=True).select_option(model)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    def answers(self, count: int) -> list[str]:
        """The texts of the answers, when so many are complete."""
        done = self.page.locator("article.answer:not(.writing)")
        expect(done).to_have_count(count)
        return [words.text_content() for words in done.locator(".text").all()]

    def compare(self, a: str, b: str, *, blind: bool, votes: bool = True) -> None:
        """Ask two versions."""
        page = self.page
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Version A").select_option(a)
        page.get_by_label("Version B").select_option(b)
        page.get_by_label("Blind").set_checked(blind)
        page.get_by_label("Seed").fill("5")
        page.get_by_label("Max tokens").fill("20")
        self.ask(QUESTION)
        if votes:
            expect(page.get_by_role("group", name="Your vote")).to_be_visible()


@pytest.fixture
def visit(browser: Any, gateway: Any) -> Iterator[Any]:
    """visit(**options of the browser's context) -> Visit. Nothing leaves the origin or complains."""
    visits: list[Visit] = []

    def start(**options: Any) -> Visit:
        visits.append(Visit(browser, gateway, **options))
        return visits[-1]

    yield start
    for visit in visits:
        visit.context.close()
        assert visit.console == []
        assert visit.urls
        assert {url[: len(visit.origin) + 1] for url in visit.urls} == {visit.origin + "/"}
        assert not any("pt-" in url for url in visit.urls), "a key in an address"


def answer_of(client: Any, model: str, messages: list[dict[str, str]], **sampling: Any) -> str:
    """What the API answers to the same."""
    answer = client.chat.completions.create(model=model, messages=messages, **sampling)
    return answer.choices[0].message.content


def test_a_conversation_is_streamed_with_the_sampling_that_was_set(visit, client):
    """The answers are those of the API to the same requests; the second request has the first one's turns."""
    visitor = visit()
    page = visitor.open()
    visitor.choose("support")
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in (
        ("Temperature", 1.2),
        ("Top p", 0.9),
        ("Top k", 50),
        ("Max tokens", 24),
        ("Seed", 7),
    ):
        page.get_by_label(label).fill(str(value))
    visitor.ask(QUESTION)
    first = visitor.answers(1)[0]
    visitor.ask("And now?")
    second = visitor.answers(2)[1]
    sampling = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 24, "seed": 7}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    extra = {"extra_body": {"top_k": 50}}
    assert first == answer_of(client, "support", messages, **sampling, **extra)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert second == answer_of(client, "support", messages, **sampling, **extra)
    assert visitor.bodies[1] == {
        "path": CHAT,
        "model": "support",
        "messages": messages,
        **sampling,
        "top_k": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_stop_keeps_what_came_and_takes_the_request_out_of_triton(visit, gateway):
    visitor = visit()
    page = visitor.open()
    visitor.choose("long")
    # Drawn at random, the answer may end by itself before it can be stopped.
    page.get_by_label("Temperature").fill("0")
    page.evaluate(STOP_AT_THE_FIRST_TOKEN)
    visitor.ask(QUESTION)
    expect(page.get_by_text("Stopped", exact=True).first).to_be_visible()
    assert visitor.answers(1)[0]
    line = gateway.wait_for("request")
    while line["request_id"] != visitor.ids[-1]:
        line = gateway.wait_for("request")
    assert 0 < line["completion_tokens"] < 200
    assert line["finish_reason"] is None
    assert gateway.metric("posttrain_gateway_in_flight") == 0


def test_a_vote_between_two_versions_is_one_row(visit, client, database):
    before = len(rows(database))
    visitor = visit()
    page = visitor.open()
    visitor.compare("support@stable", "long@only", blind=False)
    assert page.locator(".pair .name").all_text_contents() == ["support@stable", "long@only"]
    answers = visitor.answers(2)
    sampling = {"temperature": 0.7, "top_p": 1, "max_tokens": 20, "seed": 5}
    asked = [{"role": "user", "content": QUESTION}]
    for model, answer in zip(("support@stable", "long@only"), answers, strict=True):
        assert answer == answer_of(client, model, asked, **sampling)
    page.get_by_label("Comment").fill("clearer")
    page.get_by_role("button", name="B is better").click()
    expect(page.get_by_text("Vote saved.").first).to_be_visible()
    (row,) = rows(database)[before:]
    assert json.loads(row.pop("messages")) == asked
    assert json.loads(row.pop("sampling")) == sampling
    del row["id"], row["time"]
    assert row == {
        "model": "support",
        "version_a": "support@stable",
        "version_b": "long@only",
        "answer_a": answers[0],
        "answer_b": answers[1],
        "choice": "b",
        "key": "alice",
        "comment": "clearer",
    }
    visitor.ask("And now?")
    visitor.answers(4)
    assert visitor.bodies[-1]["messages"][1] == {"role": "assistant", "content": answers[1]}


@pytest.mark.parametrize("drawn", [0, 255])
def test_a_blind_vote_names_the_version_that_wrote_the_answer(visit, client, database, drawn):
    """Whichever side the coin gives a version: names and figures appear after the vote, the right ones."""
    visitor = visit()
    visitor.page.add_init_script(f"crypto.getRandomValues = (bytes) => bytes.fill({drawn})")
    page = visitor.open()
    visitor.compare("support@stable", "long@only", blind=True)
    answers = visitor.answers(2)
    assert "@" not in "".join(page.locator(".pair header").all_text_contents())
    expect(page.locator(".pair .note").first).to_be_hidden()
    page.keyboard.press("1")
    expect(page.get_by_text("Vote saved.").first).to_be_visible()
    versions = page.locator(".pair .name").all_text_contents()
    assert versions == (["long@only", "support@stable"] if drawn == 0 else ["support@stable", "long@only"])
    row = rows(database)[-1]
    assert ([row["version_a"], row["version_b"]], row["choice"]) == (versions, "a")
    assert [row["answer_a"], row["answer_b"]] == answers
    asked = [{"role": "user", "content": QUESTION}]
    sampling = {"temperature": 0.7, "top_p": 1, "max_tokens": 20, "seed": 5}
    assert row["answer_a"] == answer_of(client, row["version_a"], asked, **sampling)
    page.keyboard.press("2")
    assert rows(database)[-1] == row, "a second vote on the same answers"


def test_a_key_that_asks_one_at_a_time_compares_too(visit):
    """dora's key would be refused with 429 for the second of two requests at once."""
    visitor = visit()
    visitor.open("pt-dora")
    visitor.compare("long@only", "long@only", blind=False)
    assert len(set(visitor.answers(2))) == 1, "the same seed"


def test_where_votes_are_not_kept_the_page_says_why_and_asks_for_none(visit):
    visitor = visit()

    def without_votes(route: Any) -> None:
        told = route.fetch().json() | {"votes": {"kept": False, "reason": "nobody keeps votes"}}
        route.fulfill(json=told)

    visitor.page.route("**/v1/page", without_votes)
    page = visitor.open()
    visitor.compare("support@stable", "long@only", blind=True, votes=False)
    visitor.answers(2)
    expect(page.locator(".round").get_by_text("Nobody keeps votes.")).to_be_visible()
    assert page.get_by_role("group", name="Your vote").count() == 0
    assert "long@only" in page.locator(".pair .name").all_text_contents()


def test_markup_is_shown_as_text(visit):
    """In what the user wrote, in what a model wrote, and in an error."""
    visitor = visit()
    page = visitor.open()
    visitor.choose("support")
    page.get_by_label("Max tokens").fill("2")
    visitor.ask(MARKUP)
    visitor.answers(1)
    assert page.locator(".user .text").text_content() == MARKUP
    delta = {"choices": [{"index": 0, "delta": {"content": MARKUP}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"completion_tokens": 9}}
    events = "".join(f"data: {json.dumps(event)}\n\n" for event in (delta, usage)) + "data: [DONE]\n\n"
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    visitor.ask("Hello")
    assert visitor.answers(2)[1] == MARKUP
    failure = f"data: {json.dumps({'error': {'message': MARKUP}})}\n\n"
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=failure))
    visitor.ask("Hello")
    expect(page.locator(".alert.inline")).to_have_text(MARKUP + ".")
    assert page.locator("#log img, #log script").count() == 0
    assert page.title() == "posttrain"


def test_a_wrong_key_is_said_and_a_right_one_kept_in_the_tab_only(visit):
    visitor = visit()
    page = visitor.open("pt-nobody")
    expect(page.get_by_role("alert")).to_have_text("The API key is not valid.")
    expect(page.get_by_label("Message")).to_be_disabled()
    assert "401" in visitor.console.pop(), "Chromium's own line about the status"
    page.get_by_label("API key").fill("pt-alice")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.reload()
    expect(page.get_by_label("Message")).to_be_enabled()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    fresh = visit()
    fresh.page.goto(fresh.origin)
    expect(fresh.page.get_by_label("Message")).to_be_disabled()


def test_an_error_of_the_gateway_gives_the_question_back(visit):
    visitor = visit()
    page = visitor.open()
    visitor.choose("down")
    visitor.ask(QUESTION)
    expect(page.locator(".alert.inline")).to_have_text("The model is not available now; try again.")
    expect(page.get_by_label("Message")).to_have_value(QUESTION)
    assert "503" in visitor.console.pop()
    page.get_by_role("button", name="New").click()
    assert page.locator("article").count() == 0


def test_on_a_phone_nothing_is_cut_off_and_answers_stand_below_each_other(visit):
    visitor = visit(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page = visitor.open()
    expect(page.get_by_label("Message")).to_be_enabled()
    expect(page.get_by_label("Seed")).to_be_hidden()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Version A").select_option("support@stable")
    page.get_by_label("Version B").select_option("long@only")
    page.get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Settings").click()
    visitor.ask("x" * 150)
    expect(page.get_by_role("group", name="Your vote")).to_be_visible()
    upper, lower = (pane.bounding_box() for pane in page.locator(".pair article").all())
    assert upper["x"] == lower["x"]
    assert upper["y"] + upper["height"] <= lower["y"]
    widths = (
        "[document.documentElement, document.getElementById('log')].map(n => n.scrollWidth - n.clientWidth)"
    )
    assert page.evaluate(widths) == [0, 0]


def test_an_answer_is_copied(visit):
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    page = visitor.open()
    visitor.choose("support")
    page.get_by_label("Max tokens").fill("6")
    visitor.ask(QUESTION)
    answer = visitor.answers(1)[0]
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == answer
