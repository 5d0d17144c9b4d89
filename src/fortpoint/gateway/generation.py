"""One prompt in the engine: prefilled, judged, and only then decoded.

Every surface that makes text comes through ``open_judged``; there is no other call of
``engine.generate`` in the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

import msgspec

from fortpoint.engine.client import Stream
from fortpoint.engine.protocol import Done, Finished, Generate, Prefilled, Token
from fortpoint.errors import ContextLengthExceeded, EngineError, InvalidRequest
from fortpoint.gateway import judgement, response_format, token_features, white_box
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.token_features import PromptTokenFeatures
from fortpoint.types import Message


@dataclass(frozen=True)
class Prompt:
    """What to answer. ``raw`` is text for the model as it is; ``messages`` is what is judged,
    and without ``raw`` also what the chat template renders. ``param`` names the field."""

    messages: tuple[Message, ...]
    param: str
    raw: str | None = None


@dataclass(frozen=True)
class Header:
    """What all parts of an answer share, and what is shown of its tokens beside their text."""

    answer_id: str
    created: int
    model: str
    features: bool = False
    n_logprobs: int | None = None

    @classmethod
    def of(cls, exchange: Exchange, prefix: str, model: str, wanted: Generate) -> Self:
        return cls(
            prefix + exchange.request_id.removeprefix("req_"),
            int(exchange.arrived_at),
            model,
            wanted.watch is not None,
            wanted.sampling.logprobs,
        )

    @property
    def detailed(self) -> bool:
        return self.features or self.n_logprobs is not None


@dataclass
class Choice:
    """One answer, as it grows. ``tokens`` are kept only where something of each is shown."""

    parts: list[str] = field(default_factory=list)
    reason: str = "stop"
    tokens: list[Token] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True)
class Opened:
    """A prompt that may be answered: its tokens to come, and what was read in it for the
    caller (empty unless the request watches)."""

    stream: Stream
    prompt_features: list[PromptTokenFeatures]


@dataclass(frozen=True)
class Answered:
    choices: list[Choice]
    prompt_features: list[PromptTokenFeatures]


async def open_judged(exchange: Exchange, prompt: Prompt, wanted: Generate, number: int) -> Opened:
    """Prefill ``prompt`` and let the guard decide; the stream then holds tokens.

    ``wanted`` says everything but the prompt. Where it steers the prompt, the guard has
    judged an unsteered pass before, in which what is watched was read too: nobody steers what
    guard and operator read in a prompt. Raises
    ``ContentBlocked``, ``GuardFailed``, ``InvalidRequest`` or an ``EngineError``. The exchange
    closes the stream, however it ends.
    """
    services, sightings = exchange.services, exchange.sightings
    steered = any(steer.scope == "all" for steer in wanted.steer)
    if steered:
        await prejudge(exchange, prompt, number)
    held = services.guard is not None and not steered
    request = msgspec.structs.replace(
        wanted,
        id=f"{exchange.request_id}-{number}",
        messages=prompt.messages if prompt.raw is None else None,
        prompt=prompt.raw,
        read=(held and services.config.guard.probes) or sightings.on,
        hold=held,
    )
    stream = await services.engine.generate(request)
    exchange.resources.push_async_callback(stream.aclose)
    prefilled = await _prefilled(stream, request, prompt.param)
    exchange.prefilled(prefilled)
    if not steered:
        sightings.prompt(number, prefilled.reading)
    white_box.check_volume(wanted.watch, exchange.usage.prompt)
    if held:
        await judgement.decide(exchange, prompt.messages, prefilled.reading, prompt.param)
        await stream.proceed()
    if wanted.watch is None:
        return Opened(stream, [])
    return Opened(stream, await token_features.of_prompt(prefilled.reading))


async def _prefilled(stream: Stream, request: Generate, param: str) -> Prefilled:
    """The first event. What the engine finds wrong with the request gets its field's name."""
    try:
        prefilled = await anext(stream, None)
    except InvalidRequest as error:
        if error.param is None and isinstance(error, ContextLengthExceeded):
            error.param = param
        elif error.param is None and request.sampling.json_schema and "schema" in error.message:
            error.param = response_format.PARAM
        raise
    if not isinstance(prefilled, Prefilled):
        raise EngineError("the engine answered out of turn")
    return prefilled


async def prejudge(exchange: Exchange, prompt: Prompt, number: int) -> None:
    """Judge a prompt that will be decoded only later; it is judged again then.

    A stream of several prompts must not begin before all of them may pass.
    """
    services, sightings = exchange.services, exchange.sightings
    judges = services.guard is not None
    reading = None
    if (judges and services.config.guard.probes) or sightings.on:
        reading = (await services.engine.scan(prompt.messages)).reading
        sightings.prompt(number, reading)
    if judges:
        await judgement.decide(exchange, prompt.messages, reading, prompt.param)


async def decode(exchange: Exchange, stream: Stream) -> AsyncIterator[Token | Finished]:
    """The tokens of an open stream, counted. Raises an ``EngineError`` if it ends early."""
    n_tokens = 0
    async for event in stream:
        if isinstance(event, Token):
            n_tokens += 1
            exchange.count(completion=1)
            exchange.sightings.token(event)
            yield event
        elif isinstance(event, Finished):
            if event.reason == "cancelled":
                raise EngineError("the engine stopped this answer")
            exchange.finish_reasons += (event.reason,)
            yield event
        elif isinstance(event, Done):
            exchange.done(event, n_tokens)
            return
        else:
            raise EngineError("the engine answered out of turn")
    raise EngineError("the engine ended this answer early")


async def collect(exchange: Exchange, opened: Opened, wanted: Generate) -> Answered:
    """All answers of an open stream, whole."""
    choices = [Choice() for _ in range(wanted.sampling.n)]
    detailed = wanted.watch is not None or wanted.sampling.logprobs is not None
    async for event in decode(exchange, opened.stream):
        choice = choices[event.choice]
        if isinstance(event, Token):
            choice.parts.append(event.text)
            if detailed:
                choice.tokens.append(event)
        else:
            choice.reason = event.reason
    return Answered(choices, opened.prompt_features)


def finish_reason(reason: str) -> str:
    """In OpenAI's words, which have none for ``stop_when``."""
    return "stop" if reason == "stop_when" else reason
