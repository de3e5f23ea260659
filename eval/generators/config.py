"""What may be measured, as configured. Imports neither torch nor openai."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from posttrain.config import FileRef, ForeignModelRef, StrictModel
from posttrain.errors import Problem


class ModelTarget(StrictModel):
    """A model loaded in this process."""

    kind: Literal["model"]
    model: ForeignModelRef = Field(description="Run directory, local path or Hub id.")
    batch_size: int = Field(32, ge=1, description="Prompts per batch; answers do not depend on it.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights.")


class EndpointTarget(StrictModel):
    """A model behind an OpenAI-compatible chat endpoint, such as the gateway in front of Triton."""

    kind: Literal["endpoint"]
    base_url: str = Field(description="Address of the API, up to and including /v1.")
    model: str = Field(min_length=1, description="Model name sent with every request.")
    key_env: str | None = Field(
        None, description="Environment variable that holds the key; none for an endpoint without keys."
    )
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name under which the task's max_new_tokens is sent."
    )
    send_temperature: bool = Field(True, description="Send the task's temperature; some models refuse one.")
    send_seed: bool = Field(True, description="Send a seed: that of the stage plus the sample's number.")
    concurrency: int = Field(4, ge=1, le=256, description="Requests in flight at once.")
    timeout_s: float = Field(120.0, gt=0.0, description="Seconds until a request counts as failed.")
    attempts: int = Field(6, ge=1, description="Tries of one request before it is left as failed.")
    backoff_s: float = Field(1.0, ge=0.0, description="First pause before a retry; it doubles, with jitter.")
    max_wait_s: float = Field(120.0, ge=0.0, description="Longest pause between two tries.")
    give_up_after: int = Field(
        8, ge=1, description="Requests failed in a row after which the endpoint counts as down."
    )


class AnswersTarget(StrictModel):
    """Answers that exist already, in a file of JSON lines or a CSV file."""

    kind: Literal["answers"]
    path: FileRef = Field(description="File with a question and an answer in each row.")
    question_column: str = Field("prompt", description="Column with the question as the task's data have it.")
    answer_column: str = Field("response", description="Column with the answer; a dotted path goes deeper.")


TargetConfig = Annotated[ModelTarget | EndpointTarget | AnswersTarget, Field(discriminator="kind")]


def check_endpoint(target: EndpointTarget, where: str) -> list[Problem]:
    """What speaks against an endpoint before it is asked."""
    problems = []
    if find_spec("openai") is None:
        remedy = "pip install 'posttrain[judge]'"
        problems.append(Problem(f"{where}.kind", "endpoints need the package openai", remedy, here=True))
    url = urlsplit(target.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        remedy = "e.g. http://localhost:8000/v1"
        problems.append(Problem(f"{where}.base_url", "is not an http or https address", remedy))
    if url.username or url.password or url.query:
        complaint = "holds credentials, which would be written to the run directory"
        problems.append(Problem(f"{where}.base_url", complaint, "use key_env"))
    if target.key_env is not None and not os.environ.get(target.key_env):
        complaint = f"the environment variable {target.key_env} is not set"
        remedy = "export it, or remove key_env for an endpoint without keys"
        problems.append(Problem(f"{where}.key_env", complaint, remedy, here=True))
    return problems
