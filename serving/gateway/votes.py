"""POST /v1/votes: which of two answers somebody preferred.

The record is what the client says: nothing here proves that the versions wrote these answers. It names the
key that vouches for it.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import Literal

from fastapi import FastAPI, Request
from pydantic import Field, field_validator

from serving.gateway.errors import ApiError, unavailable, unknown_model
from serving.gateway.exchange import Exchange
from serving.gateway.keys import ApiKey
from serving.gateway.logs import log
from serving.gateway.routes import Router
from serving.gateway.schemas import ApiModel, Drawing, Message, Text
from serving.gateway.service import Service
from serving.monitor.votes import Vote, VoteStore

MAX_COMMENT_CHARACTERS = 2000
NOT_KEPT = "votes are not kept here: the gateway's configuration names no monitoring.database"


class VoteRequest(ApiModel):
    """POST /v1/votes."""

    model: Text = Field(min_length=1, max_length=256, description="Public name of the model.")
    messages: list[Message] = Field(min_length=1, description="The conversation both answers are to.")
    version_a: Text = Field(min_length=1, max_length=256, description="NAME@VERSION that gave answer A.")
    version_b: Text = Field(min_length=1, max_length=256, description="NAME@VERSION that gave answer B.")
    answer_a: Text
    answer_b: Text
    choice: Literal["a", "b", "tie", "both_bad"]
    sampling: Drawing = Field(default_factory=Drawing, description="How both answers were drawn.")
    comment: Text | None = Field(None, max_length=MAX_COMMENT_CHARACTERS)

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, value: list[Message]) -> list[Message]:
        if value[-1].role != "user":
            raise ValueError("must end with a message of the user, which both answers are to")
        return value


class VoteKept(ApiModel):
    """The answer: the vote is on the disk."""

    id: str
    object: Literal["vote"] = "vote"


def add_votes(app: FastAPI, router: Router, service: Service, store: VoteStore | None) -> None:
    """The route; without a store it is a 404 that says why."""

    @app.post("/v1/votes")
    async def vote(request: Request, body: VoteRequest) -> VoteKept:
        """Keep a preference between two answers. Answered when it is on the disk."""
        if store is None:
            raise ApiError(404, NOT_KEPT, code="votes_not_kept")
        exchange: Exchange = request.state.exchange
        key = exchange.key
        assert key is not None, "the guard lets nobody in without a key"
        model = _check(router, key, body, service.max_messages)
        state = service.limiter.admit(key)
        try:
            return VoteKept(id=await store.add(_record(body, model, key)))
        except sqlite3.Error as error:
            # Of its kind only: the message may quote what was to be written.
            log("vote_lost", logging.ERROR, request_id=exchange.request_id, detail=type(error).__name__)
            raise unavailable("the vote could not be written; send it again", "vote_not_kept") from error
        finally:
            service.limiter.release(state)


def _check(router: Router, key: ApiKey, body: VoteRequest, max_messages: int) -> str:
    """The model's name. Raises ApiError: 404 for a model this key may not use, 400 for what is no version."""
    model, _ = router.table.find(body.model, key)
    for param, name in (("version_a", body.version_a), ("version_b", body.version_b)):
        try:
            _, version = router.table.find(name, key)
        except ApiError as error:
            raise unknown_model(name, param) from error
        if version is None:
            raise ApiError(400, f"{param} is NAME@VERSION, as GET /v1/models lists it", param=param)
    if len(body.messages) > max_messages:
        raise ApiError(400, f"at most {max_messages} messages are accepted", param="messages")
    return model.name


def _record(body: VoteRequest, model: str, key: ApiKey) -> Vote:
    return Vote(
        model=model,
        messages=[message.rendered() for message in body.messages],
        version_a=body.version_a,
        version_b=body.version_b,
        choice=body.choice,
        answer_a=body.answer_a,
        answer_b=body.answer_b,
        sampling=body.sampling.model_dump(exclude_none=True),
        key=key.name,
        comment=body.comment or None,
    )
