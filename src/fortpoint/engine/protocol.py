"""What gateway and engine say to each other over the Unix socket.

A frame is four bytes of big-endian length and that many bytes of MessagePack, one struct of
``Request`` (to the engine) or ``Event`` (from it). Requests of one connection are
multiplexed by ``id``, which the client chooses. Every stream of events for an ``id`` ends
with exactly one ``Done``, ``Failed``, ``Scanned``, ``Embedded`` or ``Scored``. A connection
that closes cancels everything it asked for.

    -> Generate(id="r1", messages=..., hold=True)
    <- Prefilled(id="r1", n_prompt_tokens=31, reading=...)     the guard decides here
    -> Proceed(id="r1")                                        or Cancel(id="r1")
    <- Token(id="r1", choice=0, text="Hel") ...
    <- Finished(id="r1", choice=0, reason="stop")
    <- Done(id="r1", usage=...)

Not protected here: the socket is a file that only the product's own user may open
(mode 0600); whoever can open it can use the model without the gateway's checks.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from fortpoint.errors import EngineError
from fortpoint.types import Message, Reading, Usage

MAX_FRAME_BYTES = 16 * 1024 * 1024

FinishReason = Literal["stop", "length", "cancelled", "stop_when", "content_filter"]


class Sampling(msgspec.Struct, frozen=True):
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_k`` 0 and ``min_p`` 0 are off.

    Penalties look at prompt and answer for ``repetition_penalty`` (1 is off), at the answer
    alone for the other two (0 is off). ``logprobs`` is None for none, else how many
    alternatives come with each token's own log-probability (0 to 5). ``json_schema`` is the
    text of a JSON Schema that the answer must satisfy.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    json_schema: str | None = None


class Condition(msgspec.Struct, frozen=True):
    """A feature reads more than ``above``, in units of its training maximum.

    ``feature`` is ``"<dictionary>/<index>"`` or the name of a direction.
    """

    feature: str
    above: float


class Steer(msgspec.Struct, frozen=True):
    """One change of the residual stream at the layer where ``target`` lives.

    ``target`` is ``"<dictionary>/<index>"`` or the name of a direction. ``strength`` is in
    units of the target's training maximum: ``add`` adds that much of it, ``clamp`` sets it to
    that much and keeps the rest (the dictionary's error too), ``ablate`` removes what lies
    along it and ignores ``strength``. ``scope`` ``answer`` leaves the prompt as it is;
    ``when`` must hold at the same token.
    """

    mode: Literal["add", "clamp", "ablate"]
    target: str
    strength: float = 0.0
    scope: Literal["all", "answer"] = "all"
    when: Condition | None = None


class Watch(msgspec.Struct, frozen=True):
    """What to send along with each token: the ``top`` features of each named dictionary."""

    dictionaries: tuple[str, ...]
    top: int = 32


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Prefill, then (after ``Proceed`` when ``hold``) decode.

    Exactly one of ``messages`` (rendered with the chat template) and ``prompt`` (raw text,
    counted as the user's) is given. ``read`` asks for the ``Reading`` of the probes and of what
    is always watched. ``adapter`` names a LoRA adapter. ``stop_when`` ends the answer at the
    first token where one of its conditions holds. ``tenant`` is who asks: places are shared
    fairly between tenants, and only requests of one tenant share what was computed for a
    common prefix.
    """

    id: str
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    read: bool = True
    hold: bool = True
    tenant: str = ""
    adapter: str | None = None
    watch: Watch | None = None
    steer: tuple[Steer, ...] = ()
    stop_when: tuple[Condition, ...] = ()


class Scan(msgspec.Struct, frozen=True, tag=True):
    """Prefill only, for a ``Reading``."""

    id: str
    messages: tuple[Message, ...]


class Embed(msgspec.Struct, frozen=True, tag=True):
    """One vector a text: the mean over tokens of the last layer's residual stream (normed)."""

    id: str
    texts: tuple[str, ...]


class ScoreText(msgspec.Struct, frozen=True, tag=True):
    """Teacher-forced log-likelihood of ``continuation`` after a prompt (operator only).

    ``messages`` are rendered with the chat template; with ``prompt`` the text is raw. After an
    empty prompt the continuation is scored from its second token on.
    """

    id: str
    continuation: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    tenant: str = ""
    adapter: str | None = None
    steer: tuple[Steer, ...] = ()


class Proceed(msgspec.Struct, frozen=True, tag=True):
    id: str


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Free the request's place at once, or with ``choice`` that of one answer of several.

    An answer that is cancelled alone ends with ``Finished`` (``cancelled``); the others go on.
    What is unknown or has ended is ignored.
    """

    id: str
    choice: int | None = None


class Describe(msgspec.Struct, frozen=True, tag=True):
    id: str


class Prefilled(msgspec.Struct, frozen=True, tag=True):
    id: str
    n_prompt_tokens: int
    reading: Reading | None


class Token(msgspec.Struct, frozen=True, tag=True):
    """Text that is ready to leave. It may be empty (part of a character or of a stop string).

    ``logprob`` and ``top`` (token text to log-probability) only where asked for. ``reading``
    (of one token, its probes named in ``Prefilled``) was taken where this token was chosen:
    in the residual stream of the token before it.
    """

    id: str
    choice: int
    text: str
    token: str | None = None
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] | None = None
    reading: Reading | None = None


class Finished(msgspec.Struct, frozen=True, tag=True):
    id: str
    choice: int
    reason: FinishReason


class Done(msgspec.Struct, frozen=True, tag=True):
    """The end of a generation. ``usage.completion`` sums over choices."""

    id: str
    usage: Usage


class Failed(msgspec.Struct, frozen=True, tag=True):
    """This request failed; ``code`` is one of ``errors.py``'s."""

    id: str
    code: str
    message: str


class Scanned(msgspec.Struct, frozen=True, tag=True):
    id: str
    usage: Usage
    reading: Reading


class Embedded(msgspec.Struct, frozen=True, tag=True):
    id: str
    usage: Usage
    vectors: tuple[tuple[float, ...], ...]


class Scored(msgspec.Struct, frozen=True, tag=True):
    """Each scored token's text and natural-log probability given all before it."""

    id: str
    usage: Usage
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


class DictionaryCard(msgspec.Struct, frozen=True):
    """A loaded dictionary of features: where it reads and how many features it has."""

    name: str
    layer: int
    n_features: int


class UpstreamState(msgspec.Struct, frozen=True):
    """One upstream server: closed is in use, open is left alone, half_open is tried next.

    ``failures`` are those in a row.
    """

    server: str
    breaker: Literal["closed", "open", "half_open"]
    failures: int


class Description(msgspec.Struct, frozen=True, tag=True):
    """What runs: answers ``Describe``. ``protections`` maps a name to on or off."""

    id: str
    model: str
    digest: str
    architecture: str
    dtype: str
    max_context: int
    created: int
    pid: int
    running: int
    waiting: int
    protections: dict[str, bool]
    adapters: tuple[str, ...] = ()
    dictionaries: tuple[DictionaryCard, ...] = ()
    directions: tuple[str, ...] = ()
    upstreams: tuple[UpstreamState, ...] = ()


Request = Generate | Scan | Embed | ScoreText | Proceed | Cancel | Describe
Event = Prefilled | Token | Finished | Done | Failed | Scanned | Embedded | Scored | Description

LAST = (Done, Failed, Scanned, Embedded, Scored, Description)
"""Events after which nothing follows for their id."""

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Request | Event) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError("a message to or from the engine was too large")
    return len(body).to_bytes(4, "big") + body


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request, or None at the end of the stream. Raises ``EngineError``."""
    body = await _read_frame(reader)
    try:
        return None if body is None else _request_decoder.decode(body)
    except msgspec.MsgspecError:
        raise EngineError("the engine was sent a message it does not know") from None


async def read_event(reader: asyncio.StreamReader) -> Event | None:
    """The next event, or None at the end of the stream. Raises ``EngineError``."""
    body = await _read_frame(reader)
    try:
        return None if body is None else _event_decoder.decode(body)
    except msgspec.MsgspecError:
        raise EngineError("the engine sent a message that is not known") from None


async def _read_frame(reader: asyncio.StreamReader) -> bytes | None:
    try:
        header = await reader.readexactly(4)
        n_bytes = int.from_bytes(header, "big")
        if n_bytes > MAX_FRAME_BYTES:
            raise EngineError("a message to or from the engine was too large")
        return await reader.readexactly(n_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
