"""Client of a Triton model with the vLLM backend's tensors: gRPC streams, and the plain HTTP /generate call.

A decoupled model answers a request with any number of responses, so gRPC needs its bidirectional stream. A
stream's errors do not name the request they belong to; hence one connection per request in flight.
"""

from __future__ import annotations

import contextlib
import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from posttrain.errors import PosttrainError, UserError

OUTPUT_FLAGS = (
    "return_finish_reason",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


class RequestFailedError(PosttrainError):
    """The server refused or failed a request; the message is the server's."""


@dataclass(frozen=True)
class Chunk:
    """One response of a stream. token_ids and logprobs: of the drawn tokens, if logprobs were asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    num_input_tokens: int


@dataclass(frozen=True)
class Generation:
    """One answer. Times in seconds from sending the request."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    num_input_tokens: int
    first_token_s: float
    total_s: float


class TritonClient:
    """Talks to one model. Urls are "host:port"; `timeout_s` bounds the wait for each response.

    version: of the model; "" is the newest that the server has loaded.
    """

    def __init__(
        self, http_url: str, grpc_url: str, model_name: str, timeout_s: float = 120.0, version: str = ""
    ) -> None:
        self.http_url = http_url
        self.grpc_url = grpc_url
        self.model_name = model_name
        self.timeout_s = timeout_s
        self.version = version

    def generate(
        self,
        prompts: Sequence[str],
        sampling: dict[str, Any],
        *,
        concurrency: int = 1,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Generation]:
        """Answers in the order of `prompts`, `concurrency` requests at a time.

        Args:
            prompts: rendered text, sent as it is.
            sampling: vLLM sampling parameters; with "logprobs" (0 is enough) the token ids come back too.
            on_done: called after each answer.

        Raises:
            RequestFailedError: of the first request that failed.
        """

        def one(prompt: str) -> Generation:
            answer = collect(self.stream(prompt, sampling), self.model_name)
            on_done()
            return answer

        if concurrency == 1:
            return [one(prompt) for prompt in prompts]
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(one, prompts))

    def stream(self, prompt: str, sampling: dict[str, Any]) -> Iterator[Chunk]:
        """Responses as they arrive. Closing the iterator early cancels the request.

        Raises:
            RequestFailedError: the server's error, or no response in time.
        """
        grpc = import_grpc()
        from tritonclient.utils import InferenceServerException

        inputs = grpc_inputs(grpc, prompt, sampling)
        responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 2**31 - 1)]
        client = grpc.InferenceServerClient(self.grpc_url, channel_args=options)
        client.start_stream(lambda result, error: responses.put((result, error)))
        finished = False
        try:
            # Raised where the connection was lost before that; the callback gets the reason.
            with contextlib.suppress(InferenceServerException):
                client.async_stream_infer(
                    self.model_name, inputs, model_version=self.version, enable_empty_final_response=True
                )
            while not finished:
                result, error = self._next(responses)
                if error is not None:
                    finished = True
                    raise RequestFailedError(f"{self.model_name}: {error.message()}")
                response = result.get_response()
                finished = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield _chunk(result)
        finally:
            client.stop_stream(cancel_requests=not finished)
            client.close()

    def _next(self, responses: queue.Queue[tuple[Any, Any]]) -> tuple[Any, Any]:
        try:
            return responses.get(timeout=self.timeout_s)
        except queue.Empty:
            raise RequestFailedError(
                f"{self.model_name}: no response from {self.grpc_url} in {self.timeout_s:.0f} s"
            ) from None

    def generate_http(self, prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
        """One answer through POST /v2/models/<name>/generate, as the response's JSON object.

        Raises:
            RequestFailedError: any other status than 200, or an error in the body.
        """
        body = {
            "text_input": prompt,
            "sampling_parameters": json.dumps(sampling),
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_num_output_tokens": True,
        }
        status, text = post_json(
            f"http://{self.http_url}/v2/models/{self.model_name}/generate", body, self.timeout_s
        )
        answer = json.loads(text) if text.startswith("{") else {"error": text}
        if status != 200 or "error" in answer:
            raise RequestFailedError(f"{self.model_name}: HTTP {status}: {answer.get('error', text)}")
        return answer


def collect(stream: Iterator[Chunk], model_name: str) -> Generation:
    """The whole answer of a stream. Raises RequestFailedError where it ends without any."""
    started = time.perf_counter()
    first_token_s = 0.0
    chunks: list[Chunk] = []
    for chunk in stream:
        if not chunks:
            first_token_s = time.perf_counter() - started
        chunks.append(chunk)
    if not chunks:
        raise RequestFailedError(f"{model_name}: the stream ended without an answer")
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[value for chunk in chunks for value in chunk.logprobs],
        finish_reason=chunks[-1].finish_reason,
        num_input_tokens=chunks[-1].num_input_tokens,
        first_token_s=first_token_s,
        total_s=time.perf_counter() - started,
    )


def drawn_tokens(text: str) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of the drawn tokens in the `logprobs` output.

    The drawn token comes first at each position, then the likeliest ones, if more were asked for.
    """
    drawn = [next(iter(position.items())) for position in json.loads(text) or []]
    return [int(token) for token, _ in drawn], [float(entry["logprob"]) for _, entry in drawn]


def import_grpc() -> Any:
    """tritonclient.grpc. Raises UserError with the install command when it is not there."""
    try:
        import tritonclient.grpc as grpc
    except ImportError as error:
        raise UserError(
            f"tritonclient is not installed ({error})\n    pip install 'posttrain[serve]'"
        ) from error
    return grpc


def post_json(url: str, body: Any, timeout_s: float) -> tuple[int, str]:
    """Status and text of a POST, errors included, without any proxy."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8")
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return response.status, response.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", errors="replace")


def grpc_inputs(
    grpc: Any, prompt: str, sampling: dict[str, Any], outputs: Sequence[str] = OUTPUT_FLAGS
) -> list[Any]:
    """The tensors of one streamed request.

    Args:
        grpc: tritonclient.grpc.
        prompt: rendered text, sent as it is.
        sampling: vLLM sampling parameters.
        outputs: which of OUTPUT_FLAGS to ask for. Each is one more tensor in every response.
    """
    import numpy as np

    texts = {"text_input": prompt, "sampling_parameters": json.dumps(sampling)}
    flags = {"stream": True} | dict.fromkeys(outputs, True)
    inputs = []
    for name, text in texts.items():
        inputs.append(grpc.InferInput(name, [1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([text.encode("utf-8")], dtype=np.object_))
    for name, value in flags.items():
        inputs.append(grpc.InferInput(name, [1], "BOOL"))
        inputs[-1].set_data_from_numpy(np.array([value], dtype=bool))
    return inputs


def _chunk(result: Any) -> Chunk:
    reason = result.as_numpy("finish_reason")[0].decode("utf-8")
    token_ids, logprobs = drawn_tokens(result.as_numpy("logprobs")[0].decode("utf-8"))
    return Chunk(
        text=result.as_numpy("text_output")[0].decode("utf-8"),
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=None if reason == "None" else reason,
        num_input_tokens=int(result.as_numpy("num_input_tokens").reshape(-1)[0]),
    )
