"""OpenAI's format from the asking side: a ``Generate`` as JSON, an answer's chunks as events.

    body = ask(request, config)                  # for path_of(request)
    decoder = Decoder(request)
    for event in decoder.feed(data): ...         # Token, Finished
    usage = decoder.usage(n_prompt_tokens)       # after is_done

An answer is believed only as far as it is checked: types, ranges, choices that were asked
for, nothing after a choice's end, a known reason for it, ``[DONE]`` last. What is wrong
raises ``EngineError``; its message repeats nothing that the server sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fortpoint.config import Upstream
from fortpoint.engine.protocol import Finished, FinishReason, Generate, Token
from fortpoint.errors import EngineError, Unsupported
from fortpoint.types import Message, Usage

_DONE = b"[DONE]"
_MAX_TOKENS = 2**31 - 1
_BYTES_PER_TOKEN = 4  # what an estimate takes for English text
_TEMPLATE_TOKENS = 4096  # what a server may put around a prompt: its own instructions, marks
_MAX_CHOICES_IN_CHUNK = 256

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "content_filter": "content_filter",
}


class UpstreamUsage(msgspec.Struct, frozen=True):
    prompt_tokens: Annotated[int, Meta(ge=0, le=_MAX_TOKENS)] = 0
    completion_tokens: Annotated[int, Meta(ge=0, le=_MAX_TOKENS)] = 0


class _Alternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class _TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    """``content`` in chats; the three lists in plain completions."""

    content: list[_TokenLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    """``delta`` in chats, ``text`` in plain completions."""

    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: Annotated[list[_Choice], Meta(max_length=_MAX_CHOICES_IN_CHUNK)] | None = None
    usage: UpstreamUsage | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_encoder = msgspec.json.Encoder()


def path_of(request: Generate) -> str:
    return "/completions" if request.messages is None else "/chat/completions"


def check_served(request: Generate, config: Upstream) -> None:
    """Raise ``Unsupported`` for the first thing asked that only an embedded model can do."""
    inside = (
        ("fortpoint.steer", bool(request.steer)),
        ("fortpoint.stop_when", bool(request.stop_when)),
        ("fortpoint.watch", request.watch is not None),
        ("fortpoint.adapter", request.adapter is not None),
    )
    for name, asked in inside:
        if asked:
            raise Unsupported(
                f"{name.rpartition('.')[2]} needs a model of this server's own; "
                "here another server answers, so leave it out",
                param=name,
            )
    sampling = request.sampling
    more = (
        ("top_k", sampling.top_k != 0),
        ("min_p", sampling.min_p != 0.0),
        ("repetition_penalty", sampling.repetition_penalty != 1.0),
    )
    for name, asked in more:
        if asked and not config.more_sampling:
            raise Unsupported(f"{name} is not known to be served upstream", param=name)


def ask(request: Generate, config: Upstream) -> bytes:
    """The request's body. Fields at their neutral value are left out."""
    sampling = request.sampling
    body: dict[str, Any] = {"model": config.model}
    if request.messages is None:
        body["prompt"] = request.prompt or ""
    else:
        body["messages"] = [_message(message) for message in request.messages]
    body |= {
        "stream": True,
        "stream_options": {"include_usage": True},
        config.max_tokens_field: sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    optional: tuple[tuple[str, Any, Any], ...] = (
        ("seed", sampling.seed, None),
        ("n", sampling.n, 1),
        ("stop", list(sampling.stop), []),
        ("presence_penalty", sampling.presence_penalty, 0.0),
        ("frequency_penalty", sampling.frequency_penalty, 0.0),
        ("top_k", sampling.top_k, 0),
        ("min_p", sampling.min_p, 0.0),
        ("repetition_penalty", sampling.repetition_penalty, 1.0),
    )
    body |= {name: value for name, value, neutral in optional if value != neutral}
    if sampling.logprobs is not None:
        body |= _logprobs(sampling.logprobs, chat=request.messages is not None)
    if sampling.json_schema is not None:
        schema = msgspec.Raw(sampling.json_schema.encode())
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    return _encoder.encode(body)


def estimate(messages: tuple[Message, ...] | None, prompt: str | None) -> int:
    """About how many tokens a prompt has, where nobody has counted them."""
    if messages is None:
        return about(prompt or "")
    return sum(4 + about(message.content) for message in messages)


def _n_bytes(request: Generate) -> int:
    texts = [request.prompt or "", *(message.content for message in request.messages or ())]
    return sum(len(text.encode()) for text in texts)


def _message(message: Message) -> dict[str, str]:
    written = {"role": message.role.value, "content": message.content}
    if message.role == "tool":
        # OpenAI's format requires it; which call it answered is not kept.
        written["tool_call_id"] = "call"
    return written


def _logprobs(top: int, *, chat: bool) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}


def about(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


class Decoder:
    """One answer's chunks, checked against what was asked."""

    def __init__(self, request: Generate) -> None:
        self._id = request.id
        self._running = set(range(request.sampling.n))
        self._n_top = request.sampling.logprobs
        self._most = UpstreamUsage(
            _n_bytes(request) + _TEMPLATE_TOKENS, request.sampling.max_tokens * request.sampling.n
        )
        self._usage: UpstreamUsage | None = None
        self._n_pieces = 0
        self._n_bytes = 0
        self.is_done = False

    def feed(self, data: bytes) -> list[Token | Finished]:
        """The events of one chunk. Raises ``EngineError``."""
        if self.is_done:
            raise EngineError("an upstream server went on after its answer's end")
        if data == _DONE:
            self._end()
            return []
        chunk = decode(_chunk_decoder, data)
        if chunk.error is not None:
            raise EngineError("an upstream server failed in the middle of its answer")
        if chunk.usage is not None:
            self._usage = chunk.usage
        return [event for choice in chunk.choices or () for event in self._events(choice)]

    def usage(self, n_prompt_tokens: int) -> Usage:
        """As the server counted; estimated, and marked so, where it did not or cannot have.

        A count that no tokenizer could give would empty the caller's budget.
        """
        told, most = self._usage, self._most
        if (
            told is not None
            and told.prompt_tokens <= most.prompt_tokens
            and told.completion_tokens <= most.completion_tokens
        ):
            return Usage(told.prompt_tokens, told.completion_tokens)
        completion = max(self._n_pieces, math.ceil(self._n_bytes / _BYTES_PER_TOKEN))
        return Usage(n_prompt_tokens, completion, estimated=True)

    def _end(self) -> None:
        if self._running:
            raise EngineError("an upstream server ended its answer early")
        self.is_done = True

    def _events(self, choice: _Choice) -> Iterator[Token | Finished]:
        if choice.index not in self._running:
            raise EngineError("an upstream server sent an answer that was not asked for")
        yield from self._tokens(choice)
        if choice.finish_reason:  # some servers write "" until the end
            if choice.finish_reason not in _REASONS:
                raise EngineError("an upstream server ended its answer in an unknown way")
            self._running.remove(choice.index)
            yield Finished(self._id, choice.index, _REASONS[choice.finish_reason])

    def _tokens(self, choice: _Choice) -> Iterator[Token]:
        text = choice.text or ""
        if choice.delta is not None:
            text = choice.delta.content or choice.delta.refusal or ""
        self._n_bytes += len(text.encode())
        scored = _scored(choice.logprobs) if self._n_top is not None and choice.logprobs else []
        for place, one in enumerate(scored):
            # The text may not be the tokens' own (parts of characters): it leaves whole.
            self._n_pieces += 1
            others = (one.top_logprobs or ())[: self._n_top]
            top = tuple((other.token, other.logprob) for other in others)
            yield Token(self._id, choice.index, "" if place else text, one.token, one.logprob, top)
        if text and not scored:
            self._n_pieces += 1
            yield Token(self._id, choice.index, text)


def _scored(logprobs: _Logprobs) -> list[_TokenLogprob]:
    """Both spellings as the chat's."""
    if logprobs.content is not None:
        return logprobs.content
    tokens, own = logprobs.tokens or [], logprobs.token_logprobs or []
    tops = logprobs.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(own) == len(tops):
        raise EngineError("an upstream server's log-probabilities do not fit its tokens")
    return [
        _TokenLogprob(token, value or 0.0, [_Alternative(*pair) for pair in (top or {}).items()])
        for token, value, top in zip(tokens, own, tops, strict=True)
    ]


def decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """JSON of a known form. Raises ``EngineError``."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise EngineError("an upstream server's answer could not be read") from None
