"""What `posttrain parity` says of an address at which no Triton server speaks HTTP."""

from __future__ import annotations

import socket
import threading

import pytest

from posttrain.errors import UserError
from serving.http_client import HttpClient

HTTP2_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\n"


def _check(url):
    with pytest.raises(UserError) as caught:
        HttpClient(url, "desk", timeout_s=10).check_ready()
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_grpc_port_is_named_as_one_that_does_not_speak_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(HTTP2_SETTINGS)

        thread = threading.Thread(target=answer)
        thread.start()
        message = _check(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "does not speak HTTP" in message
    assert "8001 is gRPC" in message


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "127.0.0.1", "http://a b:8000", "http://[::1"])
def test_what_is_no_address_is_said_to_be_none(url):
    message = _check(url)
    assert url in message
    assert "is not an address" in message
    assert "http://127.0.0.1:8000" in message


def test_a_port_at_which_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "no server answers there" in _check(f"http://127.0.0.1:{port}")
