"""Server-sent events: tokens leave once they may, the last event only after its audit entry.

A request that is refused or fails before its first token never gets here; its answer is a
plain HTTP error. An error after the first token becomes one ``data: {"error": ...}`` event,
written by the edge, and the stream ends without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
from litestar.types import Receive, Scope, Send

from fortpoint.engine.protocol import Finished, Generate, Token
from fortpoint.errors import EngineError
from fortpoint.gateway import faults, record, wire
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.generation import Choice, Opened, released
from fortpoint.gateway.token_features import PromptTokenFeatures

Next = Callable[[], Awaitable[Opened]]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
]
_END = b"data: [DONE]\n\n"


class Format(Protocol):
    """How a surface writes its answers, whole or in chunks."""

    def whole(
        self, choices: Sequence[Choice], usage: wire.UsageCounts, note: wire.Note
    ) -> object: ...

    def opening(self, index: int) -> object | None: ...

    def piece(self, index: int, token: Token) -> object: ...

    def closing(self, index: int, reason: str) -> object: ...

    def chunk(
        self,
        pieces: Sequence[Any],
        usage: wire.UsageCounts | msgspec.UnsetType | None,
        note: wire.Note | msgspec.UnsetType = msgspec.UNSET,
    ) -> object: ...


class EventStream:
    """The response of one streamed generation, an ASGI application.

    ``first`` is open and judged; ``later`` open and judge the further prompts, one after the
    other, each with as many answers as are ``wanted``.
    """

    def __init__(
        self,
        exchange: Exchange,
        form: Format,
        first: Opened,
        later: Sequence[Next],
        wanted: Generate,
        include_usage: bool,
    ) -> None:
        self._exchange = exchange
        self._form = form
        self._first = first
        self._later = later
        self._wanted = wanted
        self._n = wanted.sampling.n
        self._watches = wanted.watch is not None
        self._detailed = self._watches or wanted.sampling.logprobs is not None
        self._include_usage = include_usage
        self._choices: list[Choice] = []
        self._prompt_features: list[list[PromptTokenFeatures]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._exchange.streaming = True
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError:
            self._note_answer()
            raise
        except Exception as error:  # noqa: BLE001 - the edge writes and records it
            self._note_answer()
            self._exchange.fault = faults.fault_of(error)
            return
        await send({"type": "http.response.body", "body": _END, "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Events as they can leave; the last closing piece waits for the audit entry."""
        held: object | None = None
        async for pieces in self._pieces():
            events = []
            for piece, closes in pieces:
                if held is not None:
                    events.append(self._event([held]))
                held = piece if closes else None
                if not closes:
                    events.append(self._event([piece]))
            if events:
                yield b"".join(events)
        if held is None:
            raise EngineError("the engine ended this answer early")
        self._note_answer()
        await self._exchange.record(record.answered(self._exchange))
        note = with_features(
            self._exchange.note(), self._prompt_features if self._watches else None
        )
        if self._include_usage:
            yield self._event([held])
            yield _data(self._form.chunk([], self._exchange.usage_counts(), note))
        else:
            yield _data(self._form.chunk([held], msgspec.UNSET, note))

    async def _pieces(self) -> AsyncIterator[list[tuple[object, bool]]]:
        """The pieces of all choices that may leave together, and whether each closes its choice."""
        for number in range(1 + len(self._later)):
            opened = self._first if number == 0 else await self._later[number - 1]()
            self._prompt_features.append(opened.prompt_features)
            base = number * self._n
            self._choices += [Choice() for _ in range(self._n)]
            openings = [self._form.opening(index) for index in range(base, base + self._n)]
            yield [(opening, False) for opening in openings if opening is not None]
            async for ready in released(self._exchange, opened, self._wanted):
                yield [piece for event in ready for piece in self._piece(base, event)]

    def _piece(self, base: int, event: Token | Finished) -> Iterator[tuple[object, bool]]:
        index = base + event.choice
        if not isinstance(event, Token):
            yield self._form.closing(index, event.reason), True
        elif event.text or self._detailed:
            self._choices[index].parts.append(event.text)
            yield self._form.piece(index, event), False

    def _note_answer(self) -> None:
        self._exchange.answers([choice.text for choice in self._choices])

    def _event(self, pieces: Sequence[object]) -> bytes:
        usage = None if self._include_usage else msgspec.UNSET
        return _data(self._form.chunk(pieces, usage))


def with_features(
    note: wire.Note, prompt_features: list[list[PromptTokenFeatures]] | None
) -> wire.Note:
    """The note with what was read in each prompt; as it is where nobody watches."""
    if prompt_features is None:
        return note
    return msgspec.structs.replace(note, prompt_features=prompt_features)


def _data(chunk: object) -> bytes:
    return b"data: " + wire.encode(chunk) + b"\n\n"
