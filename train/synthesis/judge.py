"""Scores by a language model behind an OpenAI-compatible endpoint (Zheng et al. 2023, 2306.05685).

What fails is never a low score. A lost connection, a timeout, a busy or broken endpoint is tried again, and
when that does not help the stage stops, to go on from the batches it has. A reply without a verdict is asked
for again, and then leaves the answer without a score, counted. The key is read from the environment when the
stage starts, and neither it nor what the endpoint says about it gets into a message, a log or a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

from posttrain.endpoint import open_client
from posttrain.errors import PosttrainError, UserError
from train.synthesis.config import JudgeConfig, prompt_problem
from train.synthesis.sampling import Drawn

_NUMBER = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
LOWEST, HIGHEST = 1.0, 10.0
WON = {"A": 1.0, "B": 0.0, "C": 0.5}
"""What the answer shown first gets."""
TIE = ""
"""Stands for the comparison of two answers that are the same, which needs no judge."""
NO_VERDICT = "judge_without_verdict"

Verdict = tuple[float | None, str | None, dict[str, float]]


def read_score(reply: str) -> float | None:
    """The last [[number]] of a reply if it is from 1 to 10, else None."""
    found = _NUMBER.findall(reply)
    return float(found[-1]) if found and LOWEST <= float(found[-1]) <= HIGHEST else None


def read_choice(reply: str) -> float | None:
    """1, 0 or 0.5 for the last [[A]], [[B]] or [[C]] of a reply, None without one."""
    found = _CHOICE.findall(reply)
    return WON[found[-1]] if found else None


def filled(template: str, **texts: str) -> str:
    """The template with `{name}` replaced by each text, in one pass: braces in a text stay what they are."""
    return re.sub("|".join(f"{{{name}}}" for name in texts), lambda found: texts[found[0][1:-1]], template)


def as_text(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as the judge reads it; a single user turn is its text."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


class Judge:
    """Asks the endpoint about every answer (mode score) or every two answers in both orders (pairwise).

    n: answers to a prompt. unfinished: whether answers without their end token are judged too. Raises
    UserError for a prompt file that lacks a placeholder, a missing key and as `open_client` does.
    """

    def __init__(self, config: JudgeConfig, prompt_file: Path, n: int, *, unfinished: bool) -> None:
        problem = prompt_problem(prompt_file, config.mode)
        if problem:
            raise UserError(f"judge.prompt: {problem}")
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise UserError(f"judge.api_key_env: the environment variable {config.api_key_env} is not set")
        self.config, self.n, self.unfinished = config, n, unfinished
        self.template = prompt_file.read_text(encoding="utf-8")
        self.client = open_client(
            config.base_url, key, timeout=config.timeout, max_retries=config.max_retries
        )

    def __call__(self, drawn: Drawn) -> list[Verdict]:
        """See Scorer. parts: none, or of pairwise how many comparisons an answer's score rests on.

        Raises UserError where the endpoint refuses the key or does not know the model, PosttrainError where
        it does not answer.
        """
        wanted = [self.unfinished or finished for finished in drawn.finished]
        if self.config.mode == "score":
            requests = [
                filled(self.template, prompt=as_text(prompt.row["prompt"]), answer=text) if judged else None
                for prompt, text, judged in zip(drawn.prompts, drawn.texts, wanted, strict=True)
            ]
            verdicts = self._ask_all(requests)
            return [_verdict(verdicts[request]) for request in requests]
        asked = [
            self._comparisons(drawn, [index for index in range(first, first + self.n) if wanted[index]])
            for first in range(0, len(drawn.texts), self.n)
        ]
        verdicts = self._ask_all([request for group in asked for _, _, request in group])
        found: list[Verdict] = []
        for first, group in zip(range(0, len(drawn.texts), self.n), asked, strict=True):
            found += win_rates(self.n, [(a - first, b - first, verdicts[request]) for a, b, request in group])
        return found

    def _comparisons(self, drawn: Drawn, judged: Sequence[int]) -> list[tuple[int, int, str]]:
        """(shown first, shown second, request) for every two answers to one prompt, both ways; no request for
        two that are the same.
        """
        texts = drawn.texts
        both = [(a, b) for pair in combinations(judged, 2) for a, b in (pair, pair[::-1])]
        return [(a, b, self._comparison(drawn, a, b) if texts[a] != texts[b] else TIE) for a, b in both]

    def _comparison(self, drawn: Drawn, a: int, b: int) -> str:
        prompt = as_text(drawn.prompts[a].row["prompt"])
        return filled(self.template, prompt=prompt, answer_a=drawn.texts[a], answer_b=drawn.texts[b])

    def _ask_all(self, requests: Sequence[str | None]) -> dict[str | None, float | None]:
        """The verdict on each distinct request, `concurrency` at a time; of TIE half, of None none."""
        distinct = [request for request in dict.fromkeys(requests) if request]
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            verdicts: dict[str | None, float | None] = {None: None, TIE: WON["C"]}
            verdicts |= zip(distinct, pool.map(self._ask, distinct), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)
        return verdicts

    def _ask(self, request: str) -> float | None:
        read = read_score if self.config.mode == "score" else read_choice
        for attempt in range(self.config.max_retries + 1):
            reply = self._reply(request, attempt)
            verdict = None if reply is None else read(reply)
            if verdict is not None:
                return verdict
        return None

    def _reply(self, request: str, attempt: int) -> str | None:
        """The text of one reply, None for what is no reply; the client tries again by itself."""
        import openai

        place = f"the judge at {self.config.base_url}"
        optional = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        arguments: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        try:
            completion = self.client.chat.completions.create(
                model=self.config.model,
                messages=[{"role": "user", "content": request}],
                seed=attempt,
                **arguments,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            name = self.config.api_key_env
            remedy = f"put a valid key into {name}" if name else "name the variable of its key in api_key_env"
            raise UserError(f"{place} refuses the key (status {error.status_code})\n    {remedy}") from None
        except openai.NotFoundError:
            raise UserError(
                f"{place} does not know the model {self.config.model} or the address (status 404)\n"
                "    correct judge.model or judge.base_url, which ends with /v1 as a rule"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return None
        except openai.APIStatusError as error:
            raise self._gave_up(f"{place} answers with status {error.status_code}") from None
        except openai.APITimeoutError:
            raise self._gave_up(f"{place} does not answer within {self.config.timeout:g} s") from None
        except openai.APIConnectionError:
            raise self._gave_up(f"{place} cannot be reached") from None
        except (openai.APIError, json.JSONDecodeError):
            return None
        if not isinstance(completion, openai.types.chat.ChatCompletion) or not completion.choices:
            return None
        return completion.choices[0].message.content

    def _gave_up(self, what: str) -> PosttrainError:
        return PosttrainError(
            f"{what}, after up to {self.config.max_retries + 1} attempts; no answer got a score for it\n"
            "    once it answers, the same command goes on from the batches that are done"
        )


def win_rates(n: int, comparisons: Sequence[tuple[int, int, float | None]]) -> list[Verdict]:
    """The share of its comparisons that each of n answers won, a tie as half.

    comparisons: (shown first, shown second, what the first got). A pair of answers counts where the judge
    gave a verdict in both orders, so that a preference for the first place cancels out. An answer without a
    comparison has no score.
    """
    first = {(a, b): won for a, b, won in comparisons}
    won, counted = [0.0] * n, [0] * n
    for a, b, forward in comparisons:
        backward = first[b, a]
        if forward is None or backward is None:
            continue
        won[a] += (forward + 1 - backward) / 2
        counted[a] += 1
    return [
        (points / count, None, {"comparisons": float(count)}) if count else (None, NO_VERDICT, {})
        for points, count in zip(won, counted, strict=True)
    ]


def _verdict(score: float | None) -> Verdict:
    return (None, NO_VERDICT, {}) if score is None else (score, None, {})
