"""Features as a caller sees them: decoded from what the engine read, token by token.

    {"token": " Gate", "features": {"l15": [[1207, 0.93], [88, 0.21]]}}

A pair is a feature's index and how strongly it is active, in units of its training maximum,
rounded to four decimals. Only the strongest that were asked for are here, and only where
``extraction.features`` allows; activations themselves never reach this process.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Literal

import msgspec

from fortpoint.engine.protocol import Token
from fortpoint.errors import EngineError
from fortpoint.types import FeatureReading, Reading, Segment

Active = list[tuple[int, float]]

_DECIMALS = 4
_IN_LINE_BYTES = 16 * 1024


class TokenFeatures(msgspec.Struct, frozen=True):
    """One token of an answer and, for each dictionary, its strongest features there.

    They were read where the token was chosen: in the residual stream of the token before it.
    """

    token: str
    features: dict[str, Active]


class PromptTokenFeatures(msgspec.Struct, frozen=True):
    """One token of a prompt: who wrote it, in which message (null for the template)."""

    role: str
    message: int | None
    features: dict[str, Active]


class ChoiceNote(msgspec.Struct, frozen=True):
    """Our own part of a choice. ``stopped_by`` says why, where ``finish_reason`` cannot."""

    features: list[TokenFeatures] | msgspec.UnsetType = msgspec.UNSET
    stopped_by: Literal["stop_when"] | msgspec.UnsetType = msgspec.UNSET


def choice_note(
    tokens: Sequence[Token] | None, reason: str | None = None
) -> ChoiceNote | msgspec.UnsetType:
    """What there is to say; unset where nothing is. ``tokens`` is None where nobody watches."""
    if tokens is None and reason != "stop_when":
        return msgspec.UNSET
    return ChoiceNote(
        msgspec.UNSET if tokens is None else [of_token(token) for token in tokens],
        "stop_when" if reason == "stop_when" else msgspec.UNSET,
    )


def of_token(token: Token) -> TokenFeatures:
    """Raises ``EngineError`` when the reading is not of one token."""
    reading, text = token.reading, token.token
    features: dict[str, Active] = {}
    if reading is not None:
        features = {part.dictionary: _rows(part, 1)[0] for part in reading.features}
    return TokenFeatures(token.text if text is None else text, features)


async def of_prompt(reading: Reading | None) -> list[PromptTokenFeatures]:
    """Every token of a prompt in order. Raises ``EngineError`` when something does not fit.

    Long ones are decoded in a thread, so that other requests' tokens keep flowing.
    """
    if reading is None or not reading.features:
        return []
    if sum(len(part.indices) for part in reading.features) <= _IN_LINE_BYTES:
        return _prompt(reading)
    return await asyncio.to_thread(_prompt, reading)


def _prompt(reading: Reading) -> list[PromptTokenFeatures]:
    names = [part.dictionary for part in reading.features]
    authors = [segment for s in reading.segments for segment in _repeated(s)]
    columns = [_rows(part, reading.n_tokens) for part in reading.features]
    if len(authors) != reading.n_tokens:
        raise _unfit()
    return [
        PromptTokenFeatures(
            author.role.value,
            author.message if author.message >= 0 else None,
            dict(zip(names, row, strict=True)),
        )
        for author, *row in zip(authors, *columns, strict=True)
    ]


def _repeated(segment: Segment) -> list[Segment]:
    return [segment] * (segment.end - segment.start)


def _rows(part: FeatureReading, n_tokens: int) -> list[Active]:
    """The active features of each token, strongest first."""
    top, n = part.top, n_tokens * part.top
    try:
        indices = struct.unpack(f"<{n}i", part.indices)
        values = struct.unpack(f"<{n}f", part.values)
    except struct.error:
        raise _unfit() from None
    pairs = list(zip(indices, [round(value, _DECIMALS) for value in values], strict=True))
    rows = [pairs[row * top : row * top + top] for row in range(n_tokens)]
    if min(indices, default=0) >= 0:
        return rows
    return [[pair for pair in row if pair[0] >= 0] for row in rows]


def _unfit() -> EngineError:
    return EngineError("the engine sent features that do not fit their tokens")
