"""One prompt in the engine: prefilled, judged, and only then decoded, and judged again.

Every surface that makes text comes through ``open_judged`` and ``released``; there is no other
call of ``engine.generate`` in the gateway, and no other way from its tokens to a caller.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

import msgspec

from fortpoint.config import Config
from fortpoint.engine.client import Stream
from fortpoint.engine.protocol import Done, Finished, Generate, Prefilled, Token
from fortpoint.engine.upstream.observer import is_upstream
from fortpoint.errors import ContextLengthExceeded, EngineError, InvalidRequest
from fortpoint.gateway import judgement, response_format, token_features, white_box
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.hold_back import HoldBack
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
    caller (empty unless the request watches). ``probes`` are those that the guard reads at each
    token, None where it judges the answer by its text alone."""

    stream: Stream
    prompt_features: list[PromptTokenFeatures]
    probes: tuple[str, ...] | None = None


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
    probes = _answer_probes(services.config, request, prefilled)
    if wanted.watch is None:
        return Opened(stream, [], probes)
    return Opened(stream, await token_features.of_prompt(prefilled.reading), probes)


def _answer_probes(
    config: Config, request: Generate, prefilled: Prefilled
) -> tuple[str, ...] | None:
    """The probes that the guard reads in the answer's tokens.

    None where it cannot, because an upstream answers, and where it must not trust them: whoever
    steers an answer could turn off what they look for.
    """
    reads = config.guard.probes and request.read and prefilled.reading is not None
    if not reads or request.steer or is_upstream(config):
        return None
    return prefilled.reading.probes if prefilled.reading is not None else None


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


async def released(
    exchange: Exchange, opened: Opened, wanted: Generate
) -> AsyncIterator[Sequence[Token | Finished]]:
    """What may leave of an open stream, as soon as it may.

    A choice that the guard cuts ends with ``content_filter`` and frees its place in the engine.
    Raises ``GuardFailed``, and an ``EngineError`` if the stream ends early.
    """
    holds = _hold_backs(exchange, opened, wanted)
    n_open = wanted.sampling.n
    async with aclosing(_decode(exchange, opened.stream)) as events:
        async for event in events:
            hold = holds[event.choice] if holds else None
            if hold is not None and hold.ended:
                continue  # what the engine computed before it heard of the cut
            if isinstance(event, Finished) and event.reason == "cancelled":
                raise EngineError("the engine stopped this answer")
            ready = (event,) if hold is None else hold.take(event)
            reasons = [end.reason for end in ready if isinstance(end, Finished)]
            exchange.finish_reasons += tuple(reasons)
            n_open -= len(reasons)
            if reasons and isinstance(event, Token):
                await _free(opened.stream, event.choice, last=n_open == 0)
            if ready:
                yield ready
            if n_open == 0 and isinstance(event, Token):
                return


async def _free(stream: Stream, choice: int, *, last: bool) -> None:
    """Stop computing a choice that was cut."""
    if last:
        await stream.aclose()
    else:
        await stream.drop(choice)


def _hold_backs(exchange: Exchange, opened: Opened, wanted: Generate) -> list[HoldBack]:
    """One for each choice; none at all where answers are not judged."""
    sampling = wanted.sampling
    shows_tokens = wanted.watch is not None or sampling.logprobs is not None
    lag = max(map(len, sampling.stop), default=0) if shows_tokens else 0
    answers = [judgement.begin_answer(exchange, opened.probes) for _ in range(sampling.n)]
    return [HoldBack(exchange, answer, lag) for answer in answers if answer is not None]


async def _decode(exchange: Exchange, stream: Stream) -> AsyncGenerator[Token | Finished, None]:
    """The tokens of an open stream, counted. Raises an ``EngineError`` if it ends early."""
    n_tokens = 0
    async for event in stream:
        if isinstance(event, Token):
            n_tokens += 1
            exchange.count(completion=1)
            exchange.sightings.token(event)
            yield event
        elif isinstance(event, Finished):
            yield event
        elif isinstance(event, Done):
            exchange.done(event, n_tokens)
            return
        else:
            raise EngineError("the engine answered out of turn")
    raise EngineError("the engine ended this answer early")


async def collect(exchange: Exchange, opened: Opened, wanted: Generate) -> Answered:
    """All answers of an open stream, whole: of each what a stream would have sent."""
    choices = [Choice() for _ in range(wanted.sampling.n)]
    detailed = wanted.watch is not None or wanted.sampling.logprobs is not None
    async for ready in released(exchange, opened, wanted):
        for event in ready:
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
