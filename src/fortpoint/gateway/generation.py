"""One prompt in the engine: prefilled, judged, and only then decoded.

Every surface that makes text comes through ``open_judged``; there is no other call of
``engine.generate`` in the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fortpoint.engine.client import Stream
from fortpoint.engine.protocol import Done, Finished, Generate, Prefilled, Sampling, Token
from fortpoint.errors import EngineError
from fortpoint.gateway import judgement
from fortpoint.gateway.exchange import Exchange
from fortpoint.types import Message


@dataclass(frozen=True)
class Prompt:
    """What to answer. ``raw`` is text for the model as it is; ``messages`` is what is judged,
    and without ``raw`` also what the chat template renders. ``param`` names the field."""

    messages: tuple[Message, ...]
    param: str
    raw: str | None = None


@dataclass
class Choice:
    """One answer, as it grows."""

    parts: list[str] = field(default_factory=list)
    reason: str = "stop"

    @property
    def text(self) -> str:
        return "".join(self.parts)


async def open_judged(
    exchange: Exchange, prompt: Prompt, sampling: Sampling, number: int
) -> Stream:
    """Prefill ``prompt`` and let the guard decide; the stream then holds tokens.

    Raises ``ContentBlocked``, ``GuardFailed`` or an ``EngineError``. The exchange closes the
    stream, however it ends.
    """
    services = exchange.services
    guarded = services.guard is not None
    stream = await services.engine.generate(
        Generate(
            id=f"{exchange.request_id}-{number}",
            sampling=sampling,
            messages=prompt.messages if prompt.raw is None else None,
            prompt=prompt.raw,
            read=guarded and services.config.guard.probes,
            hold=guarded,
        )
    )
    exchange.resources.push_async_callback(stream.aclose)
    prefilled = await anext(stream, None)
    if not isinstance(prefilled, Prefilled):
        raise EngineError("the engine answered out of turn")
    exchange.count(prompt=prefilled.n_prompt_tokens)
    if guarded:
        await judgement.decide(exchange, prompt.messages, prefilled.reading, prompt.param)
        await stream.proceed()
    return stream


async def prejudge(exchange: Exchange, prompt: Prompt) -> None:
    """Judge a prompt that will be decoded only later; it is judged again then.

    A stream of several prompts must not begin before all of them may pass.
    """
    services = exchange.services
    if services.guard is None:
        return
    reading = None
    if services.config.guard.probes:
        reading = (await services.engine.scan(prompt.messages)).reading
    await judgement.decide(exchange, prompt.messages, reading, prompt.param)


async def decode(exchange: Exchange, stream: Stream) -> AsyncIterator[Token | Finished]:
    """The tokens of an open stream, counted. Raises an ``EngineError`` if it ends early."""
    async for event in stream:
        if isinstance(event, Token):
            exchange.count(completion=1)
            yield event
        elif isinstance(event, Finished):
            if event.reason == "cancelled":
                raise EngineError("the engine stopped this answer")
            exchange.finish_reasons += (event.reason,)
            yield event
        elif isinstance(event, Done):
            return
        else:
            raise EngineError("the engine answered out of turn")
    raise EngineError("the engine ended this answer early")


async def collect(exchange: Exchange, stream: Stream, n: int) -> list[Choice]:
    """All ``n`` answers of an open stream, whole."""
    choices = [Choice() for _ in range(n)]
    async for event in decode(exchange, stream):
        choice = choices[event.choice]
        if isinstance(event, Token):
            choice.parts.append(event.text)
        else:
            choice.reason = event.reason
    return choices
