"""What judges and targets behind an OpenAI-compatible endpoint are configured with alike, and its checks.

Imports neither torch nor openai.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from urllib.parse import urlsplit

from pydantic import Field

from posttrain.config import StrictModel
from posttrain.errors import Problem


class EndpointFields(StrictModel):
    """Which endpoint is asked, and how insistently."""

    base_url: str = Field(description="Address of the API, up to and including /v1.")
    model: str = Field(min_length=1, description="Model name sent with every request.")
    key_env: str | None = Field(
        None, description="Environment variable that holds the key; none for an endpoint without keys."
    )
    concurrency: int = Field(4, ge=1, le=256, description="Requests in flight at once.")
    attempts: int = Field(6, ge=1, description="Tries of one request before it is left as failed.")
    give_up_after: int = Field(
        8, ge=1, description="Requests failed in a row after which the endpoint counts as down."
    )


def check_endpoint(config: EndpointFields, where: str, *, key_needed: bool = True) -> list[Problem]:
    """What speaks against an endpoint before it is asked; the key only where it will be sent."""
    problems = []
    if find_spec("openai") is None:
        remedy = "pip install 'posttrain[judge]'"
        problems.append(Problem(f"{where}.kind", "endpoints need the package openai", remedy, here=True))
    problems += _check_address(config.base_url, f"{where}.base_url")
    if config.key_env is not None and key_needed:
        problems += _check_key(config.key_env, f"{where}.key_env")
    return problems


def _check_address(base_url: str, where: str) -> list[Problem]:
    wrong = Problem(where, "is not an http or https address", "e.g. http://localhost:8000/v1")
    try:
        url = urlsplit(base_url)
        port = url.port
    except ValueError:  # brackets or a port that no address has
        return [wrong]
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or port == 0
        or any(map(str.isspace, base_url))
    ):
        return [wrong]
    if url.username or url.password or url.query or url.fragment:
        what = "holds credentials or a query, which would be written to the run directory"
        return [Problem(where, what, "use key_env")]
    return []


def _check_key(variable: str, where: str) -> list[Problem]:
    key = os.environ.get(variable)
    if not key:
        what = f"the environment variable {variable} is not set"
        return [Problem(where, what, "export it, or remove key_env for an endpoint without keys", here=True)]
    if not (key.isascii() and key.isprintable()) or " " in key:
        what = f"the environment variable {variable} holds white space or letters that no key can have"
        return [Problem(where, what, "export the key alone, without a line break", here=True)]
    return []
