"""Client of Triton's generate endpoint over plain HTTP: whole answers, and server-sent events."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from posttrain.errors import UserError
from serving.client import OUTPUT_FLAGS, Chunk, Generation, RequestFailedError, drawn_tokens


class HttpClient:
    """Talks to one version of one model.

    base_url: with its scheme, "http://127.0.0.1:8000". version: "" is the newest that is loaded.
    """

    def __init__(self, base_url: str, model_name: str, version: str = "", timeout_s: float = 120.0) -> None:
        self.model_url = f"{base_url.rstrip('/')}/v2/models/{model_name}"
        self.url = f"{self.model_url}/versions/{version}" if version else self.model_url
        self.timeout_s = timeout_s

    def check_ready(self) -> None:
        """Raise UserError unless the server is there and the model's version is ready."""
        try:
            with self._open(f"{self.url}/ready", None):
                return
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", errors="replace").strip()
            raise UserError(
                f"{self.url}: the server is there, but this model version is not ready "
                f"(HTTP {error.code}{f': {text}' if text else ''})\n"
                "    load it, or name another with --model and --version"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.url}: no server answers there ({error})\n    start it, or correct --url"
            ) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise UserError(
                f"{self.url}: is not an address ({error})\n    correct --url, for example http://127.0.0.1:8000"
            ) from None
        except http.client.HTTPException as error:
            raise UserError(
                f"{self.url}: what answers there does not speak HTTP ({error!r})\n"
                "    --url is the server's HTTP port, by default 8000; 8001 is gRPC, for --grpc"
            ) from None

    def generate(self, prompt: str, sampling: dict[str, Any]) -> Generation:
        """One answer in one response. Raises RequestFailedError."""
        started = time.perf_counter()
        try:
            with self._open(f"{self.url}/generate", _body(prompt, sampling, stream=False)) as response:
                chunk = _chunk(json.loads(response.read()))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failed(error) from None
        seconds = time.perf_counter() - started
        return Generation(
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            finish_reason=chunk.finish_reason,
            num_input_tokens=chunk.num_input_tokens,
            first_token_s=seconds,
            total_s=seconds,
        )

    def stream(self, prompt: str, sampling: dict[str, Any]) -> Iterator[Chunk]:
        """The answer piece by piece. Raises RequestFailedError."""
        try:
            with self._open(f"{self.url}/generate_stream", _body(prompt, sampling, stream=True)) as response:
                for line in response:
                    if line.startswith(b"data:"):
                        yield _chunk(json.loads(line[5:]))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failed(error) from None

    def _open(self, url: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=self.timeout_s)

    def _failed(self, error: Exception) -> RequestFailedError:
        text = str(error)
        if isinstance(error, urllib.error.HTTPError):
            text = f"HTTP {error.code}: {error.read().decode('utf-8', errors='replace')}"
        return RequestFailedError(f"{self.url}: {text}")


def _body(prompt: str, sampling: dict[str, Any], stream: bool) -> dict[str, Any]:
    return {
        "text_input": prompt,
        "sampling_parameters": json.dumps(sampling),
        "stream": stream,
        "exclude_input_in_output": True,
        **dict.fromkeys(OUTPUT_FLAGS, True),
    }


def _chunk(answer: dict[str, Any]) -> Chunk:
    if "error" in answer:
        raise ValueError(answer["error"])
    token_ids, logprobs = drawn_tokens(answer["logprobs"])
    reason = answer["finish_reason"]
    return Chunk(
        text=answer["text_output"],
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=None if reason == "None" else reason,
        num_input_tokens=int(answer["num_input_tokens"]),
    )
