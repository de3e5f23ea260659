"""The gateway while Triton's model process is killed: every client is answered, and it finds Triton again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event, Semaphore
from typing import Any

import openai
import pytest

from serving.embedded import EmbeddedServer
from tests.integration.conftest import processes_of

CLIENTS = 8
ANSWERED_WITHIN_SECONDS = 5
START_SECONDS = 60
ASKED = [{"role": "user", "content": "Where is my order?"}]


def _answer(client: openai.OpenAI) -> tuple[str, list[Any]]:
    answer = client.chat.completions.create(
        model="long", messages=ASKED, temperature=0, max_tokens=12, logprobs=True
    )
    return answer.choices[0].message.content, answer.choices[0].logprobs.content


@pytest.mark.slow
def test_clients_get_errors_and_then_answers_again(
    start_gateway: Callable[[dict[str, Any]], Any], settings: dict[str, Any], triton: EmbeddedServer
) -> None:
    """Both models come back, also the one that was loaded through Triton's API."""
    gateway = start_gateway(settings)
    before = _answer(gateway.client())
    begun, over = Semaphore(0), Event()

    def ask() -> None:
        """One streamed answer after another, until there is none."""
        while not over.is_set():
            stream = gateway.client().chat.completions.create(
                model="long", messages=ASKED, temperature=0, max_tokens=150, stream=True
            )
            next(stream)
            begun.release()
            list(stream)

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            for _ in asked:
                assert begun.acquire(timeout=START_SECONDS)
            for pid, arguments in processes_of(triton.shm_prefix).items():
                if arguments[0].endswith("triton_python_backend_stub"):
                    os.kill(pid, signal.SIGKILL)
            done, waiting = wait(asked, timeout=ANSWERED_WITHIN_SECONDS)
        finally:
            over.set()
        assert waiting == set()
    # An answer under way breaks off; the next question is refused.
    failures = {type(request.exception()) for request in done}
    assert failures <= {openai.APIError, openai.InternalServerError}

    with pytest.raises(openai.InternalServerError) as refused:
        _answer(gateway.client())
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1

    # The client waits as long as the gateway says, and tries again.
    assert _answer(gateway.client().with_options(max_retries=START_SECONDS)) == before
    triton.wait_until_ready()
