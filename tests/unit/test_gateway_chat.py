"""`posttrain chat` against servers that break off, or do not speak OpenAI's API."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from posttrain.errors import PosttrainError, UserError
from serving.chat import Api, Chat

EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HELLO = b'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    """Start a server that answers its one request with these bytes and closes; gives its url."""
    listeners, threads = [], []

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def once() -> None:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        threads.append(threading.Thread(target=once, daemon=True))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for thread in threads:
        thread.join(10)
    for listener in listeners:
        listener.close()


def test_a_whole_answer_is_remembered(serve):
    chat = Chat(Api(serve(EVENTS + HELLO + DONE)), "m")
    assert chat.ask("Hi", io.StringIO()) == "Hello"
    assert chat.messages[-1] == {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (EVENTS + HELLO, "was cut off before its end"),
        (EVENTS, "was cut off before its end"),
        (EVENTS.replace(b"Connection: close", b"Content-Length: 900") + HELLO, "cut off|connection failed"),
        (
            EVENTS.replace(b"Connection: close", b"Transfer-Encoding: chunked") + b"2\r\nda",
            "connection failed",
        ),
        (EVENTS + b"data: {half\n\n", "does not answer as an OpenAI-compatible API .JSONDecodeError"),
        (EVENTS + b'data: {"object": "x"}\n\n', "does not answer as an OpenAI-compatible API .KeyError"),
        (EVENTS + b"data: \xff\n\n", "does not answer as an OpenAI-compatible API .UnicodeDecodeError"),
        (b"SSH-2.0-OpenSSH\r\n", "connection failed .BadStatusLine"),
        (b"", "connection failed|cannot be reached"),
    ],
)
def test_a_broken_answer_is_an_error_and_is_not_remembered(serve, answer, message):
    chat = Chat(Api(serve(answer)), "m")
    with pytest.raises(PosttrainError, match=message):
        chat.ask("Hi", io.StringIO())
    assert chat.messages == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": [1]}'])
def test_a_list_of_models_that_is_none(serve, body):
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    with pytest.raises(PosttrainError, match="--url goes up to and with /v1"):
        Api(serve(head + body)).models()


@pytest.mark.parametrize("key", ["pt-secret\n", "pt-sécret"])
def test_a_key_that_no_header_can_hold_is_not_shown(key):
    with pytest.raises(UserError, match="the API key") as caught:
        Api("http://127.0.0.1:1/v1", key).models()
    assert "cret" not in str(caught.value)
