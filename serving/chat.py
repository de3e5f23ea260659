"""`posttrain chat`: talk to a model behind an OpenAI-compatible API in the terminal. Standard library only.

    posttrain chat --url http://localhost:8080/v1 --model desk

The API key is read from POSTTRAIN_API_KEY, else OPENAI_API_KEY: never from the command line, where every user
of the machine could read it. Lines piped in are asked one after the other as one conversation.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from posttrain.errors import PosttrainError, UserError

KEY_VARIABLES = ("POSTTRAIN_API_KEY", "OPENAI_API_KEY")
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TIMEOUT_SECONDS = 120


@dataclass
class Api:
    """An OpenAI-compatible API. url: up to and with /v1."""

    url: str
    key: str | None = None

    def models(self) -> list[str]:
        """The names of the models. Raises UserError or PosttrainError."""
        with self._reading(), self._open("/models", None) as response:
            return [str(model["id"]) for model in json.load(response)["data"]]

    def stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of a chat's answer as they arrive; closing the iterator cancels it.

        Raises:
            UserError: the API refuses the request or the key.
            PosttrainError: it failed, cannot be reached, answers with something else than OpenAI's events, or
                ends them before `[DONE]`: what came until then is not the whole answer.
        """
        with self._reading(), self._open("/chat/completions", {**body, "stream": True}) as response:
            for line in response:
                text = line.decode("utf-8").strip()
                if text == "data: [DONE]":
                    return
                if not text.startswith("data: "):
                    continue
                chunk = json.loads(text.removeprefix("data: "))
                if "error" in chunk:
                    raise PosttrainError(f"{self.url}: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
        raise PosttrainError(f"{self.url}: the answer was cut off before its end")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Make what goes wrong with an answer a PosttrainError."""
        try:
            yield
        except PosttrainError:
            raise
        except (http.client.HTTPException, OSError) as error:
            raise PosttrainError(f"{self.url}: the connection failed ({error!r})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PosttrainError(
                f"{self.url}: does not answer as an OpenAI-compatible API ({error!r})\n"
                "    --url goes up to and with /v1"
            ) from error

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            if not (self.key.isascii() and self.key.isprintable()):
                raise UserError(
                    f"the API key ({' or '.join(KEY_VARIABLES)}) holds characters that no key has"
                )
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        local = urllib.parse.urlsplit(self.url).hostname in LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if local else []
        try:
            return urllib.request.build_opener(*proxies).open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise _refused(self.url, error) from None
        except (urllib.error.URLError, TimeoutError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else "no answer in time"
            raise PosttrainError(f"{self.url}: cannot be reached ({reason})") from None


def _refused(url: str, error: urllib.error.HTTPError) -> PosttrainError:
    text = error.read().decode("utf-8", "replace")
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text[:200] or error.reason
    remedy = f"\n    put the API key into {KEY_VARIABLES[0]}" if error.code == 401 else ""
    kind = UserError if error.code < 500 else PosttrainError
    return kind(f"{url}: HTTP {error.code}: {message}{remedy}")


@dataclass
class Chat:
    """One conversation. settings: further fields of each request, such as temperature."""

    api: Api
    model: str
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, out: TextIO) -> str:
        """Write the answer to `out` as it arrives, and remember it; what Ctrl-C left of it counts.

        Raises UserError or PosttrainError; then the question is forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        opening = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": opening + self.messages, **self.settings}
        pieces: list[str] = []
        try:
            for piece in self.api.stream(body):
                pieces.append(piece)
                out.write(piece)
                out.flush()
        except KeyboardInterrupt:
            out.write(" [stopped]")
        except PosttrainError:
            self.messages.pop()
            raise
        out.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return "".join(pieces)


def run(
    url: str, model: str | None, system: str | None, settings: dict[str, Any], env: Mapping[str, str]
) -> None:
    """Talk until the input ends.

    In a terminal an error is shown and the conversation goes on; from a pipe it ends the command.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"--url {url}: is not a URL\n    for example http://localhost:8080/v1")
    api = Api(url, next((env[name] for name in KEY_VARIABLES if env.get(name)), None))
    known = api.models()
    if model is None and not known:
        raise UserError(f"{url}: serves no model to this key")
    chat = Chat(api, model or known[0], system, settings)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())

        print(f"{chat.model} at {url}. {HELP}", file=sys.stderr)
    for line in _lines(interactive):
        if line == "/exit":
            return
        if line == "/reset":
            chat.messages.clear()
        elif line:
            try:
                chat.ask(line, sys.stdout)
            except PosttrainError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, line by line; Ctrl-C at the prompt drops the line."""
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        yield line.strip()
