"""The client of an OpenAI-compatible endpoint, as every stage that asks one needs it.

Texts and keys are for the host that the configuration names: redirects are not followed, and what the
environment holds for OpenAI is not sent to others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from posttrain.errors import UserError

if TYPE_CHECKING:
    import openai

_NO_KEY = "none"
_LONGEST = 300


def open_client(base_url: str, key: str | None, *, timeout: float, max_retries: int) -> openai.OpenAI:
    """A client for `base_url`, with `key` or as one without.

    timeout: seconds of a request. max_retries: what the client tries again by itself. Raises UserError where
    the package openai is missing, and for an address or a proxy that cannot be used.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("endpoints need the package openai\n    pip install 'posttrain[judge]'") from error
    try:
        # Without a key of its own the client would take OPENAI_API_KEY, and send it to a stranger.
        return openai.OpenAI(
            api_key=key or _NO_KEY,
            base_url=base_url,
            max_retries=max_retries,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
            default_headers=_of_strangers(base_url),
        )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{base_url}: cannot be asked ({redacted(str(error), key)})\n"
            "    look at the address, and at HTTP_PROXY, HTTPS_PROXY and ALL_PROXY of the environment"
        ) from None


def redacted(text: str, key: str | None) -> str:
    """The beginning of what an endpoint said, on one line and without the key."""
    text = " ".join(text.split())
    return (text.replace(key, "***") if key else text)[:_LONGEST]


def _of_strangers(base_url: str) -> dict[str, Any]:
    """Default headers: OPENAI_ORG_ID and OPENAI_PROJECT_ID of the environment are for OpenAI alone."""
    import openai

    if urlsplit(base_url).hostname == "api.openai.com":
        return {}
    return {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
