"""Requests of the OpenAI API as this gateway takes them.

Fields that OpenAI does not know are refused, as OpenAI does. Of those it knows, one that would change the
answer and cannot be honoured here is refused unless it says nothing (null, 0, an empty list); one that would
not is taken and ignored. An answer is never silently different.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ANSWERS = 16
UNSUPPORTED_CHAT = (
    "audio",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
)
UNSUPPORTED_TEXT = ("logit_bias", "suffix")
IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
)
NOTHING: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none",),
    "function_call": ("none",),
}
"""Values besides null, [] and {} with which an unsupported field asks for nothing."""


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no text holds and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def _refused(param: str, message: str) -> PydanticCustomError:
    """A mistake about the request as a whole, with the field it is about."""
    return PydanticCustomError("refused", message, {"param": param})  # type: ignore[arg-type]


def _seed(seed: int, index: int) -> int:
    """seed + index, from the largest 64-bit number on to the smallest."""
    return (seed + index + 2**63) % 2**64 - 2**63


class ApiModel(BaseModel):
    """Strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class TextPart(ApiModel):
    """A part of a message. Only text is understood."""

    type: Literal["text"]
    text: Text


class Message(ApiModel):
    """One turn. Parts are joined with a line break; `developer` is rendered as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def rendered(self) -> dict[str, str]:
        """What the chat template gets."""
        parts = self.content
        content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(ApiModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Drawing(ApiModel):
    """How tokens are drawn and where an answer ends."""

    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy. Default: 1.")
    top_p: Number | None = Field(None, gt=0, le=1, description="Default: 1.")
    top_k: int | None = Field(
        None, ge=-1, le=1_000_000, description="Not OpenAI's; 0 or -1: off, the default."
    )
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)


class Sampling(Drawing):
    """What both endpoints take."""

    model: Text = Field(min_length=1, max_length=256)
    n: int | None = Field(
        None, ge=1, le=MAX_ANSWERS, description="Answers to the same prompt; the i-th with seed + i."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, max_length=512, description="Keeps its version where a model is sticky.")

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if name not in IGNORED}
        for name in cls.unsupported():
            value = data.get(name)
            if value is None or value in ([], {}) or value in NOTHING.get(name, ()):
                data.pop(name, None)
            else:
                raise _refused(name, f"'{name}' is not supported")
        return data

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", "'stream_options' is only allowed with stream: true")
        return self

    @classmethod
    def unsupported(cls) -> tuple[str, ...]:
        """Fields of OpenAI that cannot be honoured."""
        return ()

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        """Tokens the answer may have and the field that says so."""
        return self.max_tokens, "max_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        """Candidates per position besides the drawn token; None: no log-probabilities."""
        return None

    @property
    def answers(self) -> int:
        """Answers wanted."""
        return self.n or 1

    def sampling(self, max_tokens: int, index: int = 0) -> dict[str, Any]:
        """vLLM's sampling parameters for the answer of this index."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,
            "seed": None if self.seed is None else _seed(self.seed, index),
            "stop": stops or None,
            "logprobs": self.logprobs_wanted,
            "frequency_penalty": self.frequency_penalty or None,
            "presence_penalty": self.presence_penalty or None,
        }
        return {"max_tokens": max_tokens} | {name: v for name, v in named.items() if v is not None}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = Field(None, description="Only {type: text}.")
    store: bool | None = Field(None, description="Only false: there is nothing to fetch later.")

    @classmethod
    def unsupported(cls) -> tuple[str, ...]:
        return UNSUPPORTED_CHAT

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value != {"type": "text"}:
            raise ValueError('only {"type": "text"} is supported')
        return value

    @field_validator("store")
    @classmethod
    def _nothing_is_stored(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("stored answers cannot be fetched here; leave it out")
        return value

    @model_validator(mode="after")
    def _agreement(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = "'max_tokens' and 'max_completion_tokens' say different things; give one"
            raise _refused("max_completion_tokens", message)
        if self.top_logprobs is not None and not self.logprobs:
            raise _refused("top_logprobs", "'top_logprobs' is only allowed with logprobs: true")
        return self

    @property
    def answer_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions. The prompt is sent as it is, special tokens included."""

    prompt: Annotated[Text, Field(min_length=1)] | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="Only false.")
    best_of: int | None = Field(None, ge=1, le=1)

    @classmethod
    def unsupported(cls) -> tuple[str, ...]:
        return UNSUPPORTED_TEXT

    @field_validator("best_of", mode="before")
    @classmethod
    def _no_selection(cls, value: Any) -> Any:
        if value is not None and value != 1:
            raise ValueError("must be 1; ask for n answers and choose among them")
        return value

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("the prompt cannot be echoed; leave it out")
        return value

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs
