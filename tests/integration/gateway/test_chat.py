"""`posttrain chat` against the gateway: the conversation of the openai client, and errors as exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import PosttrainError
from serving.chat import Api, Chat

ROOT = Path(__file__).parents[3]
SETTINGS = {"temperature": 0.8, "max_tokens": 12, "seed": 5}
SYSTEM = "You are the support desk of a small shop."


def posttrain_chat(gateway: Any, typed: str, *options: str, key: str = "pt-alice") -> Any:
    command = [sys.executable, "-m", "posttrain", "chat", "--url", gateway.url, *options]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "POSTTRAIN_API_KEY": key,
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        command, input=typed.encode(), capture_output=True, check=False, env=environment, timeout=120
    )


def converse(client: Any, *questions: str) -> list[str]:
    """The answers to these questions in one conversation, by the openai client."""
    messages = [{"role": "system", "content": SYSTEM}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="support", messages=messages, **SETTINGS)
        answers.append(answer.choices[0].message.content)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_conversation_is_kept_until_it_is_reset(gateway, client):
    first, second = converse(client, "Hello", "Where is my order?")
    fresh = converse(client, "Where is my order?")[0]
    options = ["--model", "support", "--system", SYSTEM, "--temperature", "0.8", "--max-tokens", "12"]
    typed = "Hello\n\nWhere is my order?\n/reset\nWhere is my order?\n/exit\nnever asked\n"
    done = posttrain_chat(gateway, typed, *options, "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{first}\n{second}\n{fresh}\n"


@pytest.mark.parametrize(
    ("options", "key", "code", "message"),
    [
        ([], "pt-nobody", 2, "HTTP 401: the API key is not valid"),
        (["--model", "nope"], "pt-alice", 2, "HTTP 404: the model 'nope' does not exist"),
        (["--temperature", "9"], "pt-alice", 2, "HTTP 400: temperature"),
        (["--model", "down"], "pt-alice", 1, "HTTP 503: the model is not available now"),
    ],
)
def test_a_refusal_ends_a_piped_conversation(gateway, options, key, code, message):
    done = posttrain_chat(gateway, "Hello\n", *options, key=key)
    assert done.returncode == code
    assert message in done.stderr.decode()
    assert done.stdout == b""


class Interrupted(Api):
    """An API whose answer the reader stops after its second piece."""

    def stream(self, body):
        yield "Hel"
        yield "lo"
        raise KeyboardInterrupt


class Failing(Api):
    """An API that fails in the middle of an answer."""

    def stream(self, body):
        yield "Hel"
        raise PosttrainError("it failed")


def test_a_stopped_answer_counts_as_far_as_it_was_read():
    out = io.StringIO()
    chat = Chat(Interrupted("http://x"), "m")
    assert chat.ask("Hi", out) == "Hello"
    assert out.getvalue() == "Hello [stopped]\n"
    assert chat.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_question_without_an_answer_is_forgotten():
    chat = Chat(Failing("http://x"), "m")
    with pytest.raises(PosttrainError, match="it failed"):
        chat.ask("Hi", io.StringIO())
    assert chat.messages == []
