"""/api/score: the log-likelihood of a given text after a prompt, token by token.

For operators only, who red-team and evaluate with it: they must be able to ask how likely a
harmful answer is, so the guard refuses nothing here. It generates nothing; each call is an entry
of the record, with what the guard thinks of its words. The extraction policy's rounding does not
hold for it.

    {"model": "m", "messages": [...], "continuation": "Paris."}
    -> {"tokens": ["Par", "is", "."], "logprobs": [-0.1, -0.02, -0.3], "sum": -0.42, ...}
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from fortpoint.config import Config
from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import Scored, ScoreText
from fortpoint.errors import ContextLengthExceeded, EngineError, InvalidRequest
from fortpoint.gateway import limits, white_box, wire
from fortpoint.gateway.chat import Turn, conversation
from fortpoint.gateway.white_box import Name, Steers, WhiteBox
from fortpoint.types import Message, Role


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Give exactly one of ``messages`` (rendered with the chat template) and ``prompt`` (raw;
    after an empty one the continuation counts from its second token on)."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    prompt: wire.Text | msgspec.UnsetType = msgspec.UNSET
    continuation: wire.SomeText
    steer: Steers = None
    adapter: Name | None = None

    @property
    def inside(self) -> WhiteBox:
        """What it asks of the model's inside."""
        return WhiteBox(steer=self.steer, adapter=self.adapter)


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Natural-log probabilities of the continuation's tokens, each given all before it."""

    model: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    sum: float
    n_tokens: int
    fortpoint: wire.Note


def parse(body: bytes, config: Config) -> ScoreRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, ScoreRequest)
    if (ask.messages is msgspec.UNSET) == (ask.prompt is msgspec.UNSET):
        raise InvalidRequest("give either messages or prompt", param="messages")
    turns = ask.messages or []
    limits.check_count(len(turns), config.server.max_messages, "messages", "messages")
    for turn in turns:
        wire.refuse_unsupported(turn)
    texts = [message.content for message in conversation(turns)]
    limits.check_texts(
        [*texts, ask.prompt or "", ask.continuation], config.server.max_prompt_bytes, "continuation"
    )
    white_box.check(ask.inside)
    return ask


def judged(ask: ScoreRequest) -> tuple[Message, ...]:
    """All text that it gives, as the guard reads it: the continuation is the assistant's."""
    turns = conversation(ask.messages or [])
    raw = () if ask.prompt is msgspec.UNSET else (Message(Role.USER, ask.prompt),)
    return (*turns, *raw, Message(Role.ASSISTANT, ask.continuation))


def request_of(ask: ScoreRequest, request_id: str, tenant: str) -> ScoreText:
    """In the engine's terms."""
    return ScoreText(
        id=request_id,
        continuation=ask.continuation,
        messages=conversation(ask.messages) if ask.messages else None,
        prompt=None if ask.prompt is msgspec.UNSET else ask.prompt,
        tenant=tenant,
        adapter=ask.adapter,
        steer=white_box.steers(ask.steer),
    )


async def scored(engine: Engine, request: ScoreText) -> Scored:
    """What the engine says, with a finite log-probability for every token.

    Raises ``EngineError`` otherwise. What the engine finds too long gets its field's name.
    """
    try:
        found = await engine.score(request)
    except ContextLengthExceeded as error:
        error.param = error.param or "continuation"
        raise
    if len(found.tokens) != len(found.logprobs) or not all(map(math.isfinite, found.logprobs)):
        raise EngineError("the engine sent scores that do not fit their tokens")
    return found


def written(scored: Scored, model: str, note: wire.Note) -> Score:
    return Score(
        model=model,
        tokens=scored.tokens,
        logprobs=scored.logprobs,
        sum=math.fsum(scored.logprobs),
        n_tokens=len(scored.tokens),
        fortpoint=note,
    )
