"""The web page: files that are the same for everybody, and GET /v1/page, which tells the page what there is.

The files hold no secret and want no key. All they show comes from the API, with the key that its user types.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.gateway.exchange import PAGE_PATHS, Exchange
from serving.gateway.routes import SEPARATOR, Model, Router, allowed
from serving.gateway.schemas import MAX_ANSWERS
from serving.gateway.service import Service
from serving.gateway.votes import MAX_COMMENT_CHARACTERS, NOT_KEPT

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, authentication: str) -> None:
    """Serve the page's files. authentication: whether the page has to ask for a key."""
    folder = files("serving.gateway") / "static"
    for path in sorted(PAGE_PATHS):
        name = path.lstrip("/") or "index.html"
        content = (folder / name).read_text(encoding="utf-8")
        if name == "index.html":
            content = content.replace('data-authentication="keys"', f'data-authentication="{authentication}"')
        app.get(path, include_in_schema=False)(_file(content, TYPES[name.rpartition(".")[2]]))


def _file(content: str, kind: str) -> Any:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send


def add_settings(app: FastAPI, router: Router, service: Service, votes: bool) -> None:
    """GET /v1/page."""

    @app.get("/v1/page")
    async def page(request: Request) -> Any:
        """For the web page: this key's models, versions and limits, and whether votes are kept."""
        exchange: Exchange = request.state.exchange
        assert exchange.key is not None
        models = [_describe(m) for m in router.table.models.values() if allowed(exchange.key, m.name)]
        return {
            "key": exchange.key.name,
            "models": models,
            "limits": {
                "messages": service.max_messages,
                "answers": MAX_ANSWERS,
                "concurrent": exchange.key.max_concurrent,
                "comment_characters": MAX_COMMENT_CHARACTERS,
            },
            "votes": {"kept": votes, "reason": None if votes else NOT_KEPT},
        }


def _describe(model: Model) -> dict[str, Any]:
    """A model, and for each of its versions the answer's longest length in tokens."""
    longest = {label: version.renderer.limits.max_output_tokens for label, version in model.versions.items()}
    return {
        "id": model.name,
        "max_tokens": min(longest.values()),
        "versions": [
            {"id": f"{model.name}{SEPARATOR}{label}", "max_tokens": tokens}
            for label, tokens in longest.items()
        ],
    }
