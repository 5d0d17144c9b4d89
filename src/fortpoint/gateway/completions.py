"""/v1/completions: raw text goes on. The guard judges it as the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fortpoint.config import Server
from fortpoint.engine.protocol import Sampling
from fortpoint.gateway import limits, wire
from fortpoint.gateway.chat import NoBias, NoPenalty, Nothing, stops
from fortpoint.gateway.generation import Choice, Prompt
from fortpoint.types import Message, Role

NoLogprobs = Annotated[
    Any,
    Meta(
        description="log-probabilities are off by the extraction policy",
        extra_json_schema={"enum": [None]},
    ),
]
NoEcho = Annotated[
    Any,
    Meta(
        description="the prompt is not sent back",
        extra_json_schema={"enum": [None, False]},
    ),
]
OneBest = Annotated[
    Any,
    Meta(
        description="use n for several answers",
        extra_json_schema={"enum": [None, 1]},
    ),
]


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Text to go on from. Fields that are not listed are ignored."""

    model: str
    prompt: wire.SomeText | Annotated[list[wire.SomeText], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: wire.StreamOptions | None = None
    n: wire.N = None
    stop: wire.Stop = None
    seed: wire.Seed = None
    temperature: wire.Temperature = None
    top_p: wire.TopP = None
    max_tokens: wire.MaxTokens = None
    user: str | None = None
    fortpoint: dict[str, Any] | None = None
    logprobs: NoLogprobs = None
    logit_bias: NoBias = None
    presence_penalty: NoPenalty = None
    frequency_penalty: NoPenalty = None
    best_of: OneBest = None
    echo: NoEcho = None
    suffix: Nothing = None


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, and in a stream one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: wire.UsageCounts | msgspec.UnsetType | None = msgspec.UNSET
    fortpoint: wire.Note | msgspec.UnsetType = msgspec.UNSET


def parse(body: bytes, server: Server) -> CompletionRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, CompletionRequest)
    texts = _texts(ask)
    limits.check_count(len(texts), server.max_inputs, "prompt", "prompts")
    limits.check_count(ask.n or 1, server.max_n, "n", "answers")
    limits.check_texts(texts, server.max_prompt_bytes, "prompt")
    limits.check_texts(stops(ask.stop), server.max_prompt_bytes, "stop")
    return ask


def prompts(ask: CompletionRequest) -> tuple[Prompt, ...]:
    return tuple(Prompt((Message(Role.USER, text),), "prompt", text) for text in _texts(ask))


def sampling(ask: CompletionRequest, server: Server) -> Sampling:
    return Sampling(
        max_tokens=ask.max_tokens or server.default_max_tokens,
        temperature=1.0 if ask.temperature is None else ask.temperature,
        top_p=1.0 if ask.top_p is None else ask.top_p,
        seed=ask.seed,
        n=ask.n or 1,
        stop=stops(ask.stop),
    )


class CompletionFormat:
    """How a continued text is written."""

    prefix = "cmpl-"

    def __init__(self, answer_id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = answer_id, created, model

    def whole(
        self, choices: Sequence[Choice], usage: wire.UsageCounts, note: wire.Note
    ) -> Completion:
        answers = [
            CompletionChoice(index, choice.text, choice.reason)
            for index, choice in enumerate(choices)
        ]
        return self.chunk(answers, usage, note)

    def opening(self, index: int) -> CompletionChoice | None:
        return None

    def piece(self, index: int, text: str) -> CompletionChoice:
        return CompletionChoice(index, text)

    def closing(self, index: int, reason: str) -> CompletionChoice:
        return CompletionChoice(index, "", reason)

    def chunk(
        self,
        pieces: Sequence[Any],
        usage: wire.UsageCounts | msgspec.UnsetType | None,
        note: wire.Note | msgspec.UnsetType = msgspec.UNSET,
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=list(pieces),
            usage=usage,
            fortpoint=note,
        )


def _texts(ask: CompletionRequest) -> list[str]:
    return [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
