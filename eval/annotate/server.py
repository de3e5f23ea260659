"""`posttrain annotate serve`: the application on a port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import socket
import sys
from types import FrameType

import uvicorn

from eval.annotate.app import Annotation, make_app
from eval.annotate.database import Database, shown
from eval.annotate.security import MAX_HEAD_BYTES, origins
from eval.annotate.store import open_study
from posttrain.errors import UserError

KEEP_ALIVE_SECONDS = 15
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
    database = Database(url)
    opened = open_study(database, study)
    listener = _listen(host, port)
    address = f"http://{host}:{listener.getsockname()[1]}"
    settings = uvicorn.Config(
        make_app(Annotation(database, opened, allowed)),
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
