"""Simulated annotators for `bench_annotate.py` and the tests: real HTTP, forms read from the pages.

An annotator answers by what is on the page alone, so that the same votes come in whatever order. A request
that got no answer is sent again, as a person presses the button again; an answer is the acknowledgement.
"""

from __future__ import annotations

import hashlib
import html
import http.client
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field

TEXT = re.compile(r'<div class="text" dir="auto">(.*?)</div>', re.DOTALL)
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')
RETRY_SECONDS = 0.05
GIVE_UP_SECONDS = 120.0
OPINIONS = ("better", "better", "better", "better", "better", "better", "tie", "both_bad")


@dataclass
class Page:
    """An answer: status, headers and body."""

    status: int
    headers: list[tuple[str, str]]
    text: str

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Browser:
    """Cookies, redirects and forms, over one connection at a time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookies: dict[str, str] = {}

    def send(self, method: str, path: str, fields: dict[str, str] | None = None) -> Page:
        """One request. Raises OSError or HTTPException when no answer came."""
        origin = f"http://127.0.0.1:{self.port}"
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        body = None
        if fields is not None:
            body = urllib.parse.urlencode(fields)
            headers |= {"Content-Type": "application/x-www-form-urlencoded", "Origin": origin}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            page = Page(answer.status, answer.getheaders(), answer.read().decode())
        finally:
            connection.close()
        for name, value in page.headers:
            if name.lower() == "set-cookie":
                key, _, rest = value.partition("=")
                self.cookies[key] = rest.partition(";")[0]
        return page

    def insist(self, method: str, path: str, fields: dict[str, str] | None = None) -> Page:
        """The same, until an answer comes that is not 503."""
        began = time.monotonic()
        while True:
            try:
                page = self.send(method, path, fields)
                if page.status != 503:
                    return page
            except (OSError, http.client.HTTPException):
                if time.monotonic() - began > GIVE_UP_SECONDS:
                    raise
            time.sleep(RETRY_SECONDS)

    def log_in(self, token: str) -> Page:
        """The login form, filled in and sent."""
        hidden = dict(HIDDEN.findall(self.insist("GET", "/login").text))
        return self.insist("POST", "/login", {**hidden, "token": token})


def form_of(page: str) -> dict[str, str]:
    """The hidden fields of the form that votes."""
    _, _, form = page.partition('<form method="post" action="/vote"')
    return dict(HIDDEN.findall(form))


def decide(name: str, texts: list[str]) -> str:
    """What the annotator thinks of a prompt and answers: a, b, tie or both_bad, in any order."""
    prompt, a, b = texts[-3:]
    low, high = sorted((a, b))
    digest = hashlib.sha256("\n".join((name, prompt, low, high)).encode()).digest()
    opinion = OPINIONS[digest[0] % len(OPINIONS)]
    if opinion != "better":
        return opinion
    # Longer answers please most annotators most of the time.
    better = max((a, b), key=len) if digest[1] % 4 else min((a, b), key=len)
    return "a" if better == a else "b"


@dataclass
class Annotator(threading.Thread):
    """Votes until nothing is left. acknowledged: nonce -> choice; undone: nonces taken back."""

    name_: str
    token: str
    port: int
    on_vote: threading.Semaphore | None = None
    acknowledged: dict[str, str] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    refused: int = 0
    repeated: int = 0
    error: BaseException | None = None

    def __post_init__(self) -> None:
        super().__init__(name=self.name_, daemon=True)
        self.browser = Browser(self.port)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """The whole working day."""
        try:
            assert self.browser.log_in(self.token).status == 303, "the token was refused"
            while self.step():
                pass
        except BaseException as error:
            self.error = error
            raise

    def step(self) -> bool:
        """Vote on one item; False when none is left."""
        page = self.browser.insist("GET", "/")
        assert page.status == 200, (page.status, page.text)
        fields = form_of(page.text)
        if not fields:
            return False
        texts = [html.unescape(text) for text in TEXT.findall(page.text)]
        choice = decide(self.name_, texts)
        chance = int(fields["nonce"][:4], 16) % 100
        self.vote(fields, choice)
        if chance < 8:
            # Pressed twice: the same vote again.
            self.vote(fields, choice)
            self.repeated += 1
        elif chance < 12:
            # Another choice from the same form, as from a second window.
            other = "tie" if choice != "tie" else "both_bad"
            assert self.browser.insist("POST", "/vote", {**fields, "choice": other}).status == 409
            self.refused += 1
        elif chance < 15:
            self.undo()
        return True

    def vote(self, fields: dict[str, str], choice: str) -> None:
        """Send a vote until it is acknowledged."""
        page = self.browser.insist("POST", "/vote", {**fields, "choice": choice})
        assert page.status == 303, (page.status, page.text)
        if fields["nonce"] not in self.acknowledged and self.on_vote is not None:
            self.on_vote.release()
        self.acknowledged[fields["nonce"]] = choice

    def undo(self) -> None:
        """Take the last vote back; the item comes again."""
        bar, _, _ = self.browser.insist("GET", "/").text.partition("/logout")
        fields = dict(HIDDEN.findall(bar))
        assert fields["last"] in self.acknowledged
        page = self.browser.insist("POST", "/undo", fields)
        assert page.status == 303, (page.status, page.text)
        self.undone.add(fields["last"])
