"""What stands between the web and the study: Host and Origin, size of forms, headers, guesses, form tokens.

`Guard` is an ASGI middleware around the whole application. Login tokens have 256 random bits, so that
guessing one is hopeless anyway; the limits keep guesses from costing anything, and from telling anything.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from eval.annotate.store import Study
from posttrain.errors import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d+))?")
MAX_FORM_BYTES = 64 * 1024
MAX_HEAD_BYTES = 16 * 1024
BODY_SECONDS = 20.0
GUESSES = 10
GUESS_SECONDS = 300.0
WRONG_SECONDS = 0.25
"""A wrong token is answered so long after its turn came, and turns are taken one after the other."""
WAITING = 40
ADDRESSES = 10_000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer, under which browsers send `Origin: null` with forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class HttpError(Exception):
    """An answer that is no page of the application's own."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True)
class Origins:
    """Under which addresses the application may be asked. public: as https://host, None: loopback only."""

    public: str | None = None

    @property
    def secure(self) -> bool:
        """Whether cookies are for https alone."""
        return self.public is not None and self.public.startswith("https:")

    def check_host(self, host: str) -> None:
        """Raises HttpError for the name of another site.

        A site can make its name point here (DNS rebinding), and its pages would then be of our origin. They
        still send that name.
        """
        if self.public is not None and host.lower() == urlsplit(self.public).netloc:
            return
        match = HOST.fullmatch(host)
        if self.public is None and match and is_loopback(match[1].strip("[]")):
            return
        raise HttpError(403, "This address is not one of the study's.")

    def check_origin(self, host: str, headers: dict[str, str]) -> None:
        """Raises HttpError for a form that another site's page sent."""
        origin = headers.get("origin")
        allowed = self.public or f"http://{host.lower()}"
        site = headers.get("sec-fetch-site", "same-origin")
        if (origin is not None and origin.lower() != allowed) or site not in ("same-origin", "none"):
            raise HttpError(403, "This form came from another site.")


def origins(host: str, public_url: str | None) -> Origins:
    """Raises UserError: not a URL, or an address that others reach without one."""
    if public_url is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host}: can be reached from other machines\n    say under which address, with "
                "--public-url https://annotate.example.org, so that requests for others are refused"
            )
        return Origins()
    parts = urlsplit(public_url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or parts.query
    ):
        raise UserError(f"--public-url {public_url}: is no address\n    write https://annotate.example.org")
    default = {"http": 80, "https": 443}[parts.scheme]
    place = parts.netloc.lower().rpartition("@")[2]
    place = place.removesuffix(f":{default}")
    return Origins(f"{parts.scheme}://{place}")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_proxy(address: str) -> None:
    """Raises UserError unless it is an address, or a network of them.

    uvicorn would take `*`, and then believe whatever address a client claims, a new one with every guess.
    """
    try:
        ipaddress.ip_network(address)
    except ValueError as error:
        raise UserError(
            f"--proxy {address}: is no address\n    name the proxy's own, as 127.0.0.1 or 10.0.0.0/24"
        ) from error


def network(address: str) -> str:
    """What wrong tokens are counted by: an IPv4 address, or the /64 of an IPv6 one, all of which one has."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def form_token(study: Study, cookie: str) -> str:
    """What forms carry beside the cookie, which another site can neither read nor make."""
    return study.keyed("form", cookie)


def check_form(study: Study, cookie: str, presented: str) -> None:
    """Raises HttpError unless the form was made for the cookie it came with."""
    if not cookie or not hmac.compare_digest(form_token(study, cookie).encode(), presented.encode()):
        raise HttpError(403, "This form is not valid any more. Load the page again.")


def known_visitor(study: Study) -> str:
    """A cookie for a browser that has logged in: nobody else can make one."""
    made = secrets.token_urlsafe(16)
    return f"{made}.{study.keyed('known-visitor', made)}"


def is_known(study: Study, visitor: str) -> bool:
    """Whether the cookie is from `known_visitor`, so that its wrong tokens are counted by themselves.

    Others behind the same address then cannot lock that browser out.
    """
    made, _, signature = visitor.partition(".")
    return hmac.compare_digest(study.keyed("known-visitor", made).encode(), signature.encode())


class Guesses:
    """Counts wrong tokens by address, or by browser that has logged in, and has all logins take turns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.wrong: OrderedDict[str, list[float]] = OrderedDict()
        self.turn = asyncio.Lock()
        self.waiting = 0

    def check(self, address: str) -> None:
        """Raises HttpError 429 for an address with too many wrong tokens, and when too many wait."""
        now = self.clock()
        recent = [moment for moment in self.wrong.get(network(address), []) if moment > now - GUESS_SECONDS]
        if len(recent) >= GUESSES:
            wait = math.ceil(recent[0] + GUESS_SECONDS - now)
            raise HttpError(429, "Too many wrong tokens. Wait a few minutes.", {"Retry-After": str(wait)})
        if self.waiting >= WAITING:
            raise HttpError(429, "Too many people are logging in. Try again.", {"Retry-After": "10"})

    async def attempt(self, address: str, find: Callable[[], Awaitable[Any]]) -> Any:
        """What `find` gives, None for a wrong token, which takes its time. Raises HttpError 429."""
        self.check(address)
        self.waiting += 1
        try:
            async with self.turn:
                self.check(address)
                found = await find()
                if found is None:
                    self._note(address)
                    await asyncio.sleep(WRONG_SECONDS)
                return found
        finally:
            self.waiting -= 1

    def _note(self, address: str) -> None:
        now = self.clock()
        place = network(address)
        kept = [moment for moment in self.wrong.pop(place, []) if moment > now - GUESS_SECONDS]
        self.wrong[place] = [*kept, now]
        while len(self.wrong) > ADDRESSES:
            self.wrong.popitem(last=False)


class Guard:
    """The middleware: what every request passes, and the headers that every answer has."""

    def __init__(self, app: App, origins: Origins) -> None:
        self.app = app
        self.origins = origins

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message.get("headers", [])}
                message["headers"] = [
                    *message.get("headers", []),
                    *(
                        (name.lower().encode(), value.encode())
                        for name, value in HEADERS.items()
                        if name.lower().encode() not in present
                    ),
                ]
            await send(message)

        try:
            body = await self._admit(scope, receive)
        except HttpError as error:
            await _plain(sender, error)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, sender)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """The body. Raises HttpError 403, 405, 408, 413, 431."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
            raise HttpError(431, "The request is too large.")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            raise HttpError(403, "This address is not one of the study's.")
        host = hosts[0].decode("latin-1")
        self.origins.check_host(host)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise HttpError(405, "Only GET and POST are answered.", {"Allow": "GET, HEAD, POST"})
        if scope["method"] != "POST":
            return b""
        self.origins.check_origin(host, headers)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(400, "The form broke off.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MAX_FORM_BYTES:
                        raise HttpError(413, "The form is too large.", {"Connection": "close"})
        except TimeoutError:
            raise HttpError(408, "The form did not arrive.", {"Connection": "close"}) from None
        return bytes(body)


async def _plain(send: Send, error: HttpError) -> None:
    body = str(error).encode()
    named = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **error.headers}
    headers = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
