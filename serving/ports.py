"""TCP ports of this machine: which are free."""

from __future__ import annotations

import socket

from posttrain.errors import UserError


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on right now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def check_free(url: str, remedy: str = "choose another") -> None:
    """Raise UserError when something listens on "host:port"."""
    host, _, port = url.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise UserError(f"{url}: the port cannot be used ({error.strerror})\n    {remedy}") from error


def reserve(url: str) -> socket.socket:
    """Keep "host:port" from other servers of this machine that reserve too, until the result is closed.

    A server listens seconds after its port was found free: another one that starts meanwhile would pass for
    it. The reservation is a Unix socket's abstract name, which ends with its process and is no file (Linux).

    Raises UserError when something listens there, or it is reserved.
    """
    check_free(url)
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0posttrain-port-{url}")
    except OSError as error:
        held.close()
        raise UserError(f"{url}: another server is about to use the port\n    choose another") from error
    return held
