"""/v1/completions: raw text goes on. The guard judges it as the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fortpoint.config import Config
from fortpoint.engine.protocol import Sampling, Token
from fortpoint.gateway import limits, sampling, token_logprobs, wire
from fortpoint.gateway.generation import Choice, Header, Prompt, finish_reason
from fortpoint.gateway.token_features import ChoiceNote, choice_note
from fortpoint.gateway.token_logprobs import CompletionLogprobs
from fortpoint.types import Message, Role

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


class CompletionRequest(sampling.TextRequest, frozen=True, kw_only=True):
    """Text to go on from. Fields that are not listed are ignored."""

    prompt: wire.SomeText | Annotated[list[wire.SomeText], Meta(min_length=1)]
    logprobs: sampling.TopLogprobs = None
    best_of: OneBest = None
    echo: NoEcho = None
    suffix: wire.Nothing = None


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    fortpoint: ChoiceNote | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, and in a stream one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: wire.UsageCounts | msgspec.UnsetType | None = msgspec.UNSET
    fortpoint: wire.Note | msgspec.UnsetType = msgspec.UNSET


def parse(body: bytes, config: Config) -> CompletionRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask, server = wire.decode(body, CompletionRequest), config.server
    texts = _texts(ask)
    limits.check_count(len(texts), server.max_inputs, "prompt", "prompts")
    limits.check_texts(texts, server.max_prompt_bytes, "prompt")
    sampling.check(ask, config)
    return ask


def prompts(ask: CompletionRequest) -> tuple[Prompt, ...]:
    return tuple(raw_prompt(text) for text in _texts(ask))


def raw_prompt(text: str) -> Prompt:
    """Raw for the engine; the user's for the guard."""
    return Prompt((Message(Role.USER, text),), "prompt", text)


def sampling_of(ask: CompletionRequest, config: Config) -> Sampling:
    return sampling.of(ask, config, ask.logprobs, ask.max_tokens)


class CompletionFormat:
    """How a continued text is written."""

    prefix = "cmpl-"

    def __init__(self, header: Header) -> None:
        self._header = header
        self._offsets: dict[int, int] = {}  # of streamed choices, in characters

    def whole(
        self, choices: Sequence[Choice], usage: wire.UsageCounts, note: wire.Note
    ) -> Completion:
        answers = [
            CompletionChoice(
                index,
                choice.text,
                finish_reason(choice.reason),
                self._logprobs(index, choice.tokens),
                choice_note(choice.tokens if self._header.features else None, choice.reason),
            )
            for index, choice in enumerate(choices)
        ]
        return self.chunk(answers, usage, note)

    def opening(self, index: int) -> CompletionChoice | None:
        return None

    def piece(self, index: int, token: Token) -> CompletionChoice:
        if not self._header.detailed:
            return CompletionChoice(index, token.text)
        note = choice_note([token] if self._header.features else None)
        return CompletionChoice(index, token.text, None, self._logprobs(index, [token]), note)

    def closing(self, index: int, reason: str) -> CompletionChoice:
        return CompletionChoice(index, "", finish_reason(reason), None, choice_note(None, reason))

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        n_top = self._header.n_logprobs
        if n_top is None:
            return None
        offset = self._offsets.get(index, 0)
        written = token_logprobs.of_completion(tokens, n_top, offset)
        self._offsets[index] = offset + sum(len(text) for text in written.tokens)
        return written

    def chunk(
        self,
        pieces: Sequence[Any],
        usage: wire.UsageCounts | msgspec.UnsetType | None,
        note: wire.Note | msgspec.UnsetType = msgspec.UNSET,
    ) -> Completion:
        return Completion(
            id=self._header.answer_id,
            created=self._header.created,
            model=self._header.model,
            choices=list(pieces),
            usage=usage,
            fortpoint=note,
        )


def _texts(ask: CompletionRequest) -> list[str]:
    return [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
