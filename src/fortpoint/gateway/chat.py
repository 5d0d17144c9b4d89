"""/v1/chat/completions: OpenAI's format in, a prompt for the engine out, and back."""

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
from fortpoint.gateway.token_logprobs import ChatLogprobs
from fortpoint.types import Message, Role

NoTools = Annotated[
    Any,
    Meta(
        description="tools are not served yet; leave it out",
        extra_json_schema={"enum": [None, []]},
    ),
]
NoToolChoice = Annotated[
    Any,
    Meta(
        description="tools are not served yet; leave it out",
        extra_json_schema={"enum": [None, "none", "auto"]},
    ),
]
NoModality = Annotated[
    Any,
    Meta(
        description="only text is served",
        extra_json_schema={"enum": [None, ["text"]]},
    ),
]


class TextPart(msgspec.Struct, frozen=True):
    """One piece of a message. Only text is served."""

    type: Literal["text"]
    text: wire.Text


class Turn(msgspec.Struct, frozen=True):
    """One message. ``developer`` counts as ``system``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: wire.Text | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: NoTools = None
    function_call: wire.Nothing = None
    audio: wire.Nothing = None


class ChatRequest(sampling.TextRequest, frozen=True, kw_only=True):
    """What to answer and how. Fields that are not listed are ignored."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_completion_tokens: sampling.MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: sampling.TopLogprobs = None
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    modalities: NoModality = None
    audio: wire.Nothing = None
    web_search_options: wire.Nothing = None


class Answer(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: Answer
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    fortpoint: ChoiceNote | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: wire.UsageCounts
    fortpoint: wire.Note


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatPiece(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    fortpoint: ChoiceNote | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatPiece]
    usage: wire.UsageCounts | msgspec.UnsetType | None = msgspec.UNSET
    fortpoint: wire.Note | msgspec.UnsetType = msgspec.UNSET


def parse(body: bytes, config: Config) -> ChatRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask, server = wire.decode(body, ChatRequest), config.server
    limits.check_count(len(ask.messages), server.max_messages, "messages", "messages")
    for turn in ask.messages:
        wire.refuse_unsupported(turn)
    limits.check_texts(
        [message.content for message in conversation(ask.messages)],
        server.max_prompt_bytes,
        "messages",
    )
    sampling.check(ask, config)
    return ask


def prompts(ask: ChatRequest) -> tuple[Prompt, ...]:
    return (Prompt(conversation(ask.messages), "messages"),)


def sampling_of(ask: ChatRequest, config: Config) -> Sampling:
    asked = [most for most in (ask.max_tokens, ask.max_completion_tokens) if most is not None]
    return sampling.of(ask, config, _n_logprobs(ask), min(asked, default=None))


def _n_logprobs(ask: ChatRequest) -> int | None:
    """``top_logprobs`` alone asks for logprobs too."""
    if ask.logprobs is False or (ask.logprobs is None and not ask.top_logprobs):
        return None
    return ask.top_logprobs or 0


class ChatFormat:
    """How an answer to a chat is written."""

    prefix = "chatcmpl-"

    def __init__(self, header: Header) -> None:
        self._header = header

    def whole(
        self, choices: Sequence[Choice], usage: wire.UsageCounts, note: wire.Note
    ) -> ChatCompletion:
        header = self._header
        answers = [
            ChatChoice(
                index,
                Answer(choice.text),
                finish_reason(choice.reason),
                self._logprobs(choice.tokens),
                choice_note(choice.tokens if header.features else None, choice.reason),
            )
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(
            id=header.answer_id,
            created=header.created,
            model=header.model,
            choices=answers,
            usage=usage,
            fortpoint=note,
        )

    def opening(self, index: int) -> ChatPiece | None:
        return ChatPiece(index, Delta("assistant", ""))

    def piece(self, index: int, token: Token) -> ChatPiece:
        delta = Delta(content=token.text)
        if not self._header.detailed:
            return ChatPiece(index, delta)
        note = choice_note([token] if self._header.features else None)
        return ChatPiece(index, delta, None, self._logprobs([token]), note)

    def closing(self, index: int, reason: str) -> ChatPiece:
        return ChatPiece(index, Delta(), finish_reason(reason), None, choice_note(None, reason))

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        n_top = self._header.n_logprobs
        return None if n_top is None else token_logprobs.of_chat(tokens, n_top)

    def chunk(
        self,
        pieces: Sequence[Any],
        usage: wire.UsageCounts | msgspec.UnsetType | None,
        note: wire.Note | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._header.answer_id,
            created=self._header.created,
            model=self._header.model,
            choices=list(pieces),
            usage=usage,
            fortpoint=note,
        )


def conversation(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The turns in the engine's terms."""
    return tuple(Message(_role(turn.role), _text(turn.content)) for turn in turns)


def _role(name: str) -> Role:
    return Role.SYSTEM if name == "developer" else Role(name)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
