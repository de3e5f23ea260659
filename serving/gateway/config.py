"""Configuration of the gateway: one YAML file, read again on SIGHUP. No FastAPI, no transformers.

What a reload changes: `models` and the API keys. The rest is read once, at the start.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from posttrain.config import StrictModel
from posttrain.errors import ConfigError, Problem
from posttrain.validation import validate
from posttrain.yaml_source import Document, load_document

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]


class VersionConfig(StrictModel):
    """One Triton model that may answer for a public model name."""

    export: str = Field(
        description="Run directory of the export: its tokenizer, template and limits are used."
    )
    triton: str = Field(pattern=r"^[^\s/:]+:\d{1,5}$", description="host:port of Triton's gRPC endpoint.")
    model: str | None = Field(None, pattern=NAME, description="Triton's model name; default: the export's.")
    model_version: int | None = Field(None, ge=1, description="Triton's model version; default: its latest.")
    adapter: str | None = Field(None, pattern=NAME, description="Adapter of the Triton model (`lora_name`).")
    weight: float = Field(
        1.0, ge=0, le=1e6, description="Share of the traffic, relative to the other versions."
    )


class ShadowConfig(StrictModel):
    """A copy of some requests, sent to a version whose answers nobody sees."""

    version: Name = Field(description="Version that gets the copies.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the requests that are copied.")
    max_concurrent: int = Field(
        4, ge=1, description="Copies in flight; further ones are left out and counted."
    )


class ModelConfig(StrictModel):
    """One public model name and the versions behind it."""

    versions: dict[Name, VersionConfig] = Field(min_length=1, description="Versions by name.")
    sticky: Literal["none", "key", "user"] = Field(
        "none",
        description="Who keeps one version: nobody, each API key, or each `user` of each key.",
    )
    shadow: ShadowConfig | None = Field(None, description="Shadow traffic; default: none.")
    special_tokens: Literal["refuse", "allow"] = Field(
        "refuse",
        description="What to do with a message that holds a special token of the tokenizer, with which it "
        "could forge a turn.",
    )


class LimitsConfig(StrictModel):
    """What one request, one connection and all of them together may take."""

    max_body_bytes: int = Field(1_048_576, ge=1024, description="Largest request body.")
    max_messages: int = Field(1024, ge=1, description="Most messages of one conversation.")
    max_connections: int = Field(1024, ge=1, description="Open connections; further ones get 503.")
    max_in_flight: int = Field(256, ge=1, description="Requests being answered; further ones get 503.")
    header_seconds: float = Field(10.0, gt=0, description="Until a new connection has sent its headers.")
    body_seconds: float = Field(30.0, gt=0, description="Until a request's body has arrived.")
    first_token_seconds: float = Field(60.0, gt=0, description="Until Triton's first response.")
    next_token_seconds: float = Field(30.0, gt=0, description="Between two responses of Triton.")
    request_seconds: float = Field(600.0, gt=0, description="For a whole request, the sending included.")
    drain_seconds: float = Field(30.0, ge=0, description="After SIGTERM: for the requests in flight.")
    unready_seconds: float = Field(
        0.0, ge=0, description="After SIGTERM: still accepting, with /health/ready at 503, before draining."
    )


class MonitoringConfig(StrictModel):
    """What is kept about the traffic."""

    database: str | None = Field(
        None, description="SQLite file for requests in numbers, samples and votes; default: nothing is kept."
    )
    samples: int = Field(
        0, ge=0, le=1_000_000, description="Conversations kept per day and model; 0 keeps no text."
    )
    redact: bool = Field(
        True, description="Whether personal data that has a form of its own is replaced in what is kept."
    )
    retention_days: float = Field(30.0, gt=0, le=3660, description="Requests and samples are deleted then.")
    log_text: Literal[False, "redacted"] = Field(
        False, description="Whether the log gets texts, always redacted; default: never any."
    )


class TracingConfig(StrictModel):
    """OpenTelemetry traces, sent by OTLP over HTTP."""

    endpoint: str = Field(
        pattern=r"^https?://[^\s/]+(/\S*)?$", description="The collector, for example http://localhost:4318."
    )
    service_name: str = Field("posttrain-gateway", min_length=1, description="`service.name`.")
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of traces begun here that are kept; a client's own decision holds.",
    )


class GatewayConfig(StrictModel):
    """The whole file."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 chooses a free one.")
    authentication: Literal["keys", "none"] = Field(
        "keys", description="API keys, or none at all: then only a loopback address is listened on."
    )
    keys_file: str | None = Field(
        None, description="YAML file of hashed API keys; default: POSTTRAIN_GATEWAY_KEYS of the environment."
    )
    private_metrics: bool = Field(False, description="Whether /metrics wants the admin key.")
    page: bool | None = Field(
        None, description="Whether / is the web page; default: on a loopback address only."
    )
    models: dict[Name, ModelConfig] = Field(min_length=1, description="Models by the name that clients send.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Sizes, counts and times.")
    monitoring: MonitoringConfig = Field(
        default_factory=MonitoringConfig, description="What is kept about the traffic."
    )
    tracing: TracingConfig | None = Field(
        None, description="Traces; default: as OTEL_EXPORTER_OTLP_ENDPOINT and its like say, else none."
    )

    @property
    def serves_page(self) -> bool:
        """Whether / is the web page."""
        return is_loopback(self.host) if self.page is None else self.page


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> GatewayConfig:
    """The configuration in `path` with the `a.b=c` overrides applied.

    Raises ConfigError with every mistake, its line and its remedy.
    """
    document = load_document(path, overrides)
    config, problems = validate(GatewayConfig, document.data, document, ())
    if config is not None:
        problems = check(config, document)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def check(config: GatewayConfig, document: Document) -> list[Problem]:
    """Contradictions between fields."""
    problems = []
    if config.authentication == "none" and not is_loopback(config.host):
        where = document.where(("authentication",))
        message = f"without keys everyone who reaches {config.host} could use the models"
        problems.append(Problem(where, message, "listen on 127.0.0.1, or make keys: posttrain gateway-key"))
    if config.monitoring.samples and config.monitoring.database is None:
        where = document.where(("monitoring", "samples"))
        problems.append(Problem(where, "samples need a place to be kept", "set monitoring.database"))
    for name, model in config.models.items():
        where = document.where(("models", name, "versions"))
        if not any(version.weight > 0 for version in model.versions.values()):
            problems.append(Problem(where, "no version has a weight above 0", "give one of them weight: 1"))
        shadow = model.shadow
        if shadow is not None and shadow.version not in model.versions:
            names = ", ".join(model.versions)
            where = document.where(("models", name, "shadow", "version"))
            problems.append(Problem(where, f"there is no version '{shadow.version}'", f"versions: {names}"))
    return problems


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
