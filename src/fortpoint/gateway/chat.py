"""/v1/chat/completions: OpenAI's format in, a prompt for the engine out, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fortpoint.config import Server
from fortpoint.engine.protocol import Sampling
from fortpoint.gateway import limits, wire
from fortpoint.gateway.generation import Choice, Prompt
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
NoBias = Annotated[
    Any,
    Meta(
        description="it is off by the extraction policy",
        extra_json_schema={"enum": [None, {}]},
    ),
]
NoLogprobs = Annotated[
    Any,
    Meta(
        description="log-probabilities are off by the extraction policy",
        extra_json_schema={"enum": [None, False]},
    ),
]
NoTopLogprobs = Annotated[
    Any,
    Meta(
        description="it is off by the extraction policy, as logprobs are",
        extra_json_schema={"enum": [None, 0]},
    ),
]
NoPenalty = Annotated[
    Any,
    Meta(
        description="penalties are not served; leave it out or send 0",
        extra_json_schema={"enum": [None, 0]},
    ),
]
NoFormat = Annotated[
    Any,
    Meta(
        description="only plain text is served",
        extra_json_schema={"enum": [None, {"type": "text"}]},
    ),
]
NoModality = Annotated[
    Any,
    Meta(
        description="only text is served",
        extra_json_schema={"enum": [None, ["text"]]},
    ),
]
Nothing = Annotated[
    Any, Meta(description="this server does not have it", extra_json_schema={"enum": [None]})
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
    function_call: Nothing = None
    audio: Nothing = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer and how. Fields that are not listed are ignored."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: wire.StreamOptions | None = None
    n: wire.N = None
    stop: wire.Stop = None
    seed: wire.Seed = None
    temperature: wire.Temperature = None
    top_p: wire.TopP = None
    max_tokens: wire.MaxTokens = None
    max_completion_tokens: wire.MaxTokens = None
    user: str | None = None
    fortpoint: dict[str, Any] | None = None
    logprobs: NoLogprobs = None
    top_logprobs: NoTopLogprobs = None
    logit_bias: NoBias = None
    presence_penalty: NoPenalty = None
    frequency_penalty: NoPenalty = None
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    response_format: NoFormat = None
    modalities: NoModality = None
    audio: Nothing = None
    web_search_options: Nothing = None


class Answer(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: Answer
    finish_reason: str
    logprobs: None = None


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
    logprobs: None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatPiece]
    usage: wire.UsageCounts | msgspec.UnsetType | None = msgspec.UNSET
    fortpoint: wire.Note | msgspec.UnsetType = msgspec.UNSET


def parse(body: bytes, server: Server) -> ChatRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, ChatRequest)
    limits.check_count(len(ask.messages), server.max_messages, "messages", "messages")
    limits.check_count(ask.n or 1, server.max_n, "n", "answers")
    for turn in ask.messages:
        wire.refuse_unsupported(turn)
    texts = [message.content for message in _messages(ask)]
    limits.check_texts(texts, server.max_prompt_bytes, "messages")
    limits.check_texts(stops(ask.stop), server.max_prompt_bytes, "stop")
    return ask


def prompts(ask: ChatRequest) -> tuple[Prompt, ...]:
    return (Prompt(_messages(ask), "messages"),)


def sampling(ask: ChatRequest, server: Server) -> Sampling:
    asked = [most for most in (ask.max_tokens, ask.max_completion_tokens) if most is not None]
    return Sampling(
        max_tokens=min(asked, default=server.default_max_tokens),
        temperature=1.0 if ask.temperature is None else ask.temperature,
        top_p=1.0 if ask.top_p is None else ask.top_p,
        seed=ask.seed,
        n=ask.n or 1,
        stop=stops(ask.stop),
    )


def stops(stop: wire.Stop) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


class ChatFormat:
    """How an answer to a chat is written."""

    prefix = "chatcmpl-"

    def __init__(self, answer_id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = answer_id, created, model

    def whole(
        self, choices: Sequence[Choice], usage: wire.UsageCounts, note: wire.Note
    ) -> ChatCompletion:
        answers = [
            ChatChoice(index, Answer(choice.text), choice.reason)
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=answers,
            usage=usage,
            fortpoint=note,
        )

    def opening(self, index: int) -> ChatPiece | None:
        return ChatPiece(index, Delta("assistant", ""))

    def piece(self, index: int, text: str) -> ChatPiece:
        return ChatPiece(index, Delta(content=text))

    def closing(self, index: int, reason: str) -> ChatPiece:
        return ChatPiece(index, Delta(), reason)

    def chunk(
        self,
        pieces: Sequence[Any],
        usage: wire.UsageCounts | msgspec.UnsetType | None,
        note: wire.Note | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=list(pieces),
            usage=usage,
            fortpoint=note,
        )


def _messages(ask: ChatRequest) -> tuple[Message, ...]:
    return tuple(Message(_role(turn.role), _text(turn.content)) for turn in ask.messages)


def _role(name: str) -> Role:
    return Role.SYSTEM if name == "developer" else Role(name)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
