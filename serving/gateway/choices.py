"""Several answers to one prompt: one stream of Triton for each, in the order in which their pieces come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from serving.gateway.upstream import Piece


async def merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of all streams as they come, each with the index of its stream.

    Every stream is read one piece ahead. An error of one of them ends all, and so does closing this one.
    Raises what a stream raises.
    """
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        # Before the streams are closed: a generator that is running cannot be.
        waiting: dict[asyncio.Future[Piece | None], int] = {}
        stack.push_async_callback(_cancel, waiting)
        for index, stream in enumerate(streams):
            waiting[asyncio.ensure_future(anext(stream, None))] = index
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                piece = future.result()
                if piece is not None:
                    waiting[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield replace(piece, index=index)


async def _cancel(waiting: dict[asyncio.Future[Piece | None], int]) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
