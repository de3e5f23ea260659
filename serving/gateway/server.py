"""The gateway as a process: start, reload on SIGHUP, drain on SIGTERM.

    posttrain gateway gateway.yaml

One process and one event loop: limits and sticky routes are kept in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import uvicorn

from posttrain.errors import UserError
from serving.client import import_grpc
from serving.gateway.app import Control, create_app
from serving.gateway.config import GatewayConfig, load_config
from serving.gateway.errors import ApiError
from serving.gateway.guard import Guard
from serving.gateway.keys import load_keys
from serving.gateway.logs import configure, log
from serving.gateway.metrics import Metrics
from serving.gateway.monitoring import open_monitor
from serving.gateway.protocol import MAX_HEADER_BYTES, bounded_protocol
from serving.gateway.routes import Router, describe, load_renderers
from serving.gateway.service import Service
from serving.gateway.tracing import open_tracing
from serving.monitor.database import check_usable
from serving.monitor.votes import VoteStore

SPARE_FILES = 256
KEEP_ALIVE_SECONDS = 15


class Gateway:
    """Everything that lives as long as the process. Made inside the event loop."""

    def __init__(self, config: GatewayConfig, path: Path | None, overrides: Sequence[str]) -> None:
        self.config = config
        self.path = path
        self.overrides = overrides
        self.threads = ThreadPoolExecutor(1, "tokenizer")
        self.metrics = Metrics()
        self.router = Router(config.limits, self.threads)
        self.service = Service(self.router, self.metrics, config.limits.max_messages)
        self.control = Control(self.reload_for_admin)
        keys = load_keys(config, os.environ)
        self.tracing = open_tracing(config.tracing, os.environ)
        self.monitor = open_monitor(config.monitoring, self.metrics)
        database = config.monitoring.database
        self.votes = VoteStore(Path(database), config.monitoring.redact) if database else None
        app = create_app(
            self.router,
            self.service,
            self.metrics,
            self.control,
            monitor=self.monitor,
            votes=self.votes,
            page=config.authentication if config.serves_page else None,
        )
        self.guard = Guard(app, config, keys, self.metrics, self.monitor, self.tracing)
        self._reloading = asyncio.Lock()

    async def start(self) -> None:
        """Read the exports. Raises UserError."""
        await self.router.load(self.config.models)
        self.metrics.show_shares(describe(self.router.table))

    def close(self) -> None:
        """Write and send what is still to be written and sent; takes seconds where nobody takes it."""
        if self.monitor is not None:
            self.monitor.close()
        if self.tracing is not None:
            self.tracing.close()

    async def reload(self) -> None:
        """Put the file's models and keys in force, or keep the old ones.

        A failure is logged, counted and raised: UserError for what is wrong with the files.
        """
        async with self._reloading:
            try:
                config = await asyncio.to_thread(load_config, self.path, self.overrides)
                keys = await asyncio.to_thread(load_keys, config, os.environ)
                await self.router.load(config.models)
            except Exception as error:
                self.metrics.reloads.labels("file", "failed").inc()
                # Of what was not foreseen the type only: its message may hold anything.
                detail = str(error) if isinstance(error, UserError) else type(error).__name__
                log("reload_failed", logging.ERROR, detail=detail)
                raise
            self.guard.keys = keys
            self.metrics.reloads.labels("file", "done").inc()
            self.metrics.show_shares(describe(self.router.table))
            fixed = config.model_copy(
                update={"models": self.config.models, "keys_file": self.config.keys_file}
            )
            log("reloaded", routes=describe(self.router.table), needs_restart=fixed != self.config)

    async def reload_for_admin(self) -> None:
        """The same for POST /admin/reload."""
        try:
            await self.reload()
        except UserError as error:
            raise ApiError(
                409, f"the old routes stay in force: {error}", code="invalid_configuration"
            ) from error

    async def reload_quietly(self) -> None:
        """The same for SIGHUP, whose sender reads the log: there is nobody to raise to."""
        with contextlib.suppress(Exception):
            await self.reload()


class Server(uvicorn.Server):
    """uvicorn's server, which drains on a signal and then ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, url: str) -> None:
        super().__init__(config)
        self.gateway = gateway
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it listens only when it does, and when signals are caught."""
        await super().startup(sockets)
        log("listening", url=self.url, routes=describe(self.gateway.router.table))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting, at once or after `unready_seconds`; a second signal ends without waiting."""
        if self.gateway.control.draining:
            self.force_exit = self.should_exit = True
            return
        self.gateway.control.draining = True
        self.loop.call_soon_threadsafe(self._drain, signal.Signals(sig).name)

    def _drain(self, name: str) -> None:
        log("draining", signal=name, in_flight=self.gateway.guard.in_flight)
        self.loop.call_later(self.gateway.config.limits.unready_seconds, self._leave)

    def _leave(self) -> None:
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until a signal."""
        self.loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = self.loop.create_task(self.gateway.reload_quietly())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        self.loop.add_signal_handler(signal.SIGHUP, reload)
        await super().serve(sockets)


def run(path: Path | None, overrides: Sequence[str], *, check: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C; with `check`, read everything and return.

    Raises UserError: configuration, keys, exports, a port that is taken.
    """
    import_grpc()
    config = load_config(path, overrides)
    if check:
        load_keys(config, os.environ)
        load_renderers(config.models, ThreadPoolExecutor(1))
        if config.monitoring.database is not None:
            check_usable(Path(config.monitoring.database))
        return
    configure()
    raise_file_limit(config.limits.max_connections + SPARE_FILES)
    asyncio.run(_serve(config, path, overrides))


async def _serve(config: GatewayConfig, path: Path | None, overrides: Sequence[str]) -> None:
    gateway = Gateway(config, path, overrides)
    await gateway.start()
    listener = listen(config.host, config.port)
    settings = uvicorn.Config(
        gateway.guard,
        http=bounded_protocol(config.limits, gateway.metrics),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(int(config.limits.drain_seconds), 1),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    await Server(settings, gateway, f"http://{config.host}:{listener.getsockname()[1]}").serve([listener])
    gateway.threads.shutdown(wait=False, cancel_futures=True)
    gateway.close()
    log("stopped")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: cannot be listened on ({error.strerror})\n    set another host= or port="
        ) from error
    return listener


def raise_file_limit(wanted: int) -> None:
    """Let the process open `wanted` files where its hard limit allows; says so where it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log(
            "few_files", logging.WARNING, open_files=possible, wanted=wanted, setting="limits.max_connections"
        )
