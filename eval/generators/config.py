"""What may be measured, as configured. Imports neither torch nor openai."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eval.endpoint_config import EndpointFields
from posttrain.config import FileRef, ForeignModelRef, StrictModel


class ModelTarget(StrictModel):
    """A model loaded in this process."""

    kind: Literal["model"]
    model: ForeignModelRef = Field(description="Run directory, local path or Hub id.")
    batch_size: int = Field(32, ge=1, description="Prompts per batch; answers do not depend on it.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights.")


class EndpointTarget(EndpointFields):
    """A model behind an OpenAI-compatible chat endpoint, such as the gateway in front of Triton."""

    kind: Literal["endpoint"]
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Name under which the task's max_new_tokens is sent."
    )
    send_temperature: bool = Field(True, description="Send the task's temperature; some models refuse one.")
    send_seed: bool = Field(True, description="Send a seed: that of the stage plus the sample's number.")
    timeout_s: float = Field(120.0, gt=0.0, description="Seconds until a request counts as failed.")
    backoff_s: float = Field(1.0, ge=0.0, description="First pause before a retry; it doubles, with jitter.")
    max_wait_s: float = Field(120.0, ge=0.0, description="Longest pause between two tries.")


class AnswersTarget(StrictModel):
    """Answers that exist already, in a file of JSON lines or a CSV file."""

    kind: Literal["answers"]
    path: FileRef = Field(description="File with a question and an answer in each row.")
    question_column: str = Field("prompt", description="Column with the question as the task's data have it.")
    answer_column: str = Field("response", description="Column with the answer; a dotted path goes deeper.")


TargetConfig = Annotated[ModelTarget | EndpointTarget | AnswersTarget, Field(discriminator="kind")]
