"""Several answers to one prompt: their pieces, their ends, their errors, and what they may use."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.gateway.answers import Tally
from serving.gateway.choices import merged
from serving.gateway.schemas import ChatRequest, CompletionRequest
from serving.gateway.upstream import Piece


class Source:
    """A stream of `count` pieces, each when it is let go on; then it fails, ends, or waits for ever."""

    def __init__(self, name: str, count: int, then: str = "end") -> None:
        self.name, self.count, self.then = name, count, then
        self.turn = asyncio.Semaphore(0)
        self.closed = False

    async def stream(self) -> Any:
        try:
            for number in range(self.count):
                await self.turn.acquire()
                last = number == self.count - 1 and self.then == "end"
                yield Piece(f"{self.name}{number}", [], "stop" if last else None, 3, 1)
            if self.then == "fail":
                raise ValueError(self.name)
            if self.then == "wait":
                await asyncio.Event().wait()
        finally:
            self.closed = True


def test_pieces_come_in_the_order_in_which_they_are_ready_and_know_their_answer() -> None:
    async def scenario() -> list[tuple[int, str]]:
        a, b = Source("a", 2), Source("b", 2)
        both = merged([a.stream(), b.stream()])
        found = []
        for source in (b, a, a, b):
            source.turn.release()
            piece = await anext(both)
            found.append((piece.index, piece.text))
        assert await anext(both, None) is None
        assert a.closed
        assert b.closed
        return found

    assert asyncio.run(scenario()) == [(1, "b0"), (0, "a0"), (0, "a1"), (1, "b1")]


def test_an_error_of_one_ends_all() -> None:
    async def scenario() -> None:
        good, bad = Source("good", 5, "wait"), Source("bad", 0, "fail")
        both = merged([good.stream(), bad.stream()])
        with pytest.raises(ValueError, match="bad"):
            await anext(both)
        assert good.closed

    asyncio.run(scenario())


@pytest.mark.parametrize("reader", ["reads no more", "was cancelled"])
def test_closing_ends_every_stream(reader: str) -> None:
    async def scenario() -> None:
        sources = [Source(str(number), 2, "wait") for number in range(3)]
        all_of_them = merged([source.stream() for source in sources])
        sources[1].turn.release()
        assert (await anext(all_of_them)).index == 1
        if reader == "was cancelled":
            waiting = asyncio.ensure_future(anext(all_of_them))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await all_of_them.aclose()
        assert all(source.closed for source in sources)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_a_tally_ends_with_the_last_answer_and_counts_the_prompt_once() -> None:
    tally = Tally(3, unfinished=2)
    reasons = []
    for index, reason in ((0, None), (1, "stop"), (0, None), (0, "length")):
        tally.count(Piece("x", [], reason, 3, 2, index))
        reasons.append(tally.finish_reason)
    assert reasons == [None, None, None, "length"]
    assert tally.usage() == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


def test_seeds_follow_each_other_and_stay_64_bit_numbers() -> None:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "x", "seed": 2**63 - 2, "n": 3})
    seeds = [request.sampling(4, index)["seed"] for index in range(request.answers)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    unseeded = CompletionRequest.model_validate({"model": "m", "prompt": "x", "n": 16})
    assert all("seed" not in unseeded.sampling(4, index) for index in range(unseeded.answers))
    for n in (None, 1):
        asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": n}
        assert ChatRequest.model_validate(asked).answers == 1
