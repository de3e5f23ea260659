"""`posttrain annotate serve`: the application on a port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import socket
import sys
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from eval.annotate.app import Annotation, make_app
from eval.annotate.database import Database, shown
from eval.annotate.security import MAX_HEAD_BYTES, check_proxy, origins
from eval.annotate.store import open_study
from posttrain.errors import UserError

KEEP_ALIVE_SECONDS = 15
HEAD_SECONDS = 10.0
"""So long a client may take for the lines before a form; security.py has the form's own bound."""
DRAIN_SECONDS = 20
CONNECTIONS = 512


def serve(
    url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8090,
    study: str | None = None,
    public_url: str | None = None,
    proxy: str | None = None,
) -> None:
    """Serve one study. port 0 chooses a free one.

    public_url: what browsers ask, where that is not this host and port. proxy: address of the reverse proxy
    whose X-Forwarded-For is believed, so that its clients are told apart. Raises UserError.
    """
    allowed = origins(host, public_url)
    if proxy is not None:
        check_proxy(proxy)
    database = Database(url)
    opened = open_study(database, study)
    listener = _listen(host, port)
    address = f"http://{host}:{listener.getsockname()[1]}"
    settings = uvicorn.Config(
        make_app(Annotation(database, opened, allowed)),
        http=Hurried,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = Server(settings)
    said = f"serving {opened.config.name} from {shown(url)} at {allowed.public or address}"
    print(f"{said} (Ctrl-C or SIGTERM ends it)", file=sys.stderr, flush=True)
    server.run([listener])


class Hurried(H11Protocol):
    """uvicorn's HTTP, which ends connections whose request does not arrive.

    uvicorn itself only bounds the pause after an answer, so that a few hundred connections that are silent,
    or send a byte now and then, would take the place of everybody (slowloris).
    """

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection, whose first request is awaited from now on."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self.head_timer is None and self._is_between():
            self._wait()
        super().data_received(data)
        if not self._is_between():
            self._done()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection."""
        self._done()
        super().connection_lost(exc)

    def _is_between(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _wait(self) -> None:
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _done(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None


class Server(uvicorn.Server):
    """uvicorn's, which ends with exit code 0 on a signal; a second one ends it without waiting."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting, and let what was sent be answered."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: cannot be listened on ({error.strerror})\n    choose another --host or --port"
        ) from error
    return listener
