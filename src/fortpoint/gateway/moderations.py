"""/v1/moderations: our detectors' judgement, in OpenAI's format.

Categories are the detectors' own names; ``illicit`` repeats ``harmful_request`` under
OpenAI's name. A list of texts has a result each; a list with parts is one
input of several texts.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fortpoint.config import Server
from fortpoint.gateway import limits, wire
from fortpoint.gateway.chat import TextPart
from fortpoint.gateway.white_box import NothingInside
from fortpoint.types import Message, Role, Verdict

_ALSO_CALLED = {"harmful_request": "illicit"}


class ModerationsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to judge. ``model`` is taken and ignored: there is one set of detectors."""

    input: wire.Text | Annotated[list[wire.Text | TextPart], Meta(min_length=1)]
    model: str | None = None
    fortpoint: NothingInside | None = None


class Moderation(msgspec.Struct, frozen=True):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class ModerationList(msgspec.Struct, frozen=True):
    id: str
    model: str
    results: list[Moderation]
    fortpoint: wire.Note


def parse(body: bytes, server: Server) -> ModerationsRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, ModerationsRequest)
    texts = [message.content for messages in conversations(ask) for message in messages]
    limits.check_count(len(texts), server.max_inputs, "input", "texts")
    limits.check_texts(texts, server.max_prompt_bytes, "input")
    return ask


def conversations(ask: ModerationsRequest) -> list[tuple[Message, ...]]:
    """One conversation for each result."""
    if isinstance(ask.input, str):
        return [_as_user(ask.input)]
    parts = [part.text if isinstance(part, TextPart) else part for part in ask.input]
    if any(isinstance(part, TextPart) for part in ask.input):
        return [_as_user(*parts)]
    return [_as_user(text) for text in parts]


def written(verdict: Verdict) -> Moderation:
    """One result. ``flagged`` is what the gate would have refused."""
    flags: dict[str, bool] = {}
    scores: dict[str, float] = {}
    for score in verdict.strongest().values():
        for name in (score.detector, _ALSO_CALLED.get(score.detector)):
            if name is not None:
                flags[name] = score.flagged
                scores[name] = score.score
    applied = {name: ["text"] for name in flags}
    return Moderation(verdict.action == "block", flags, scores, applied)


def _as_user(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(Role.USER, text) for text in texts)
