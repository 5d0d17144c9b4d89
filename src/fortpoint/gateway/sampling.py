"""What every request for text has in common: how to choose its tokens, and when to stop.

OpenAI's fields stand where OpenAI has them. ``top_k``, ``min_p`` and ``repetition_penalty``
are under ``"fortpoint"``, and also at the top, where vLLM's clients send them; where both are
given, ours counts. What is out of range is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fortpoint.config import Config
from fortpoint.engine.protocol import Sampling
from fortpoint.gateway import limits, response_format, token_logprobs, white_box
from fortpoint.gateway.response_format import ResponseFormat
from fortpoint.gateway.white_box import MinP, RepetitionPenalty, TopK, WhiteBox

_INT64 = 2**63

StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)] | None
MaxTokens = Annotated[int, Meta(ge=1, le=10_000_000)] | None
Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
TopLogprobs = Annotated[int, Meta(ge=0, le=token_logprobs.MAX_TOP)] | None
NoBias = Annotated[
    Any,
    Meta(description="it is off by the extraction policy", extra_json_schema={"enum": [None, {}]}),
]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class TextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The base of a request to generate, whatever its surface."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=64)] | None = None
    stop: Stop = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: TopK = None
    min_p: MinP = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: RepetitionPenalty = None
    max_tokens: MaxTokens = None
    response_format: ResponseFormat = None
    user: str | None = None
    fortpoint: WhiteBox | None = None
    logit_bias: NoBias = None


def check(ask: TextRequest, config: Config) -> None:
    """What the types cannot say. Raises ``InvalidRequest`` and its like."""
    limits.check_count(ask.n or 1, config.server.max_n, "n", "answers")
    limits.check_texts(_stops(ask.stop), config.server.max_prompt_bytes, "stop")
    white_box.check(ask.fortpoint or white_box.NOTHING)


def of(
    ask: TextRequest, config: Config, n_logprobs: int | None, max_tokens: int | None
) -> Sampling:
    """In the engine's terms. ``n_logprobs`` and ``max_tokens`` differ between surfaces.

    Raises ``Unsupported`` for log-probabilities that the policy does not give, and
    ``InvalidRequest`` for a schema beyond the limits.
    """
    ours = ask.fortpoint or white_box.NOTHING
    return Sampling(
        max_tokens=max_tokens or config.server.default_max_tokens,
        temperature=_given(1.0, ask.temperature),
        top_p=_given(1.0, ask.top_p),
        seed=ask.seed,
        n=ask.n or 1,
        stop=_stops(ask.stop),
        logprobs=token_logprobs.require_allowed(n_logprobs, config.extraction),
        top_k=max(0, int(_given(0, ours.top_k, ask.top_k))),
        min_p=_given(0.0, ours.min_p, ask.min_p),
        presence_penalty=_given(0.0, ask.presence_penalty),
        frequency_penalty=_given(0.0, ask.frequency_penalty),
        repetition_penalty=_given(1.0, ours.repetition_penalty, ask.repetition_penalty),
        json_schema=response_format.schema_of(ask.response_format),
    )


def _given(default: float, *values: float | None) -> float:
    """The first that is given, else the default."""
    return next((value for value in values if value is not None), default)


def _stops(stop: Stop) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
