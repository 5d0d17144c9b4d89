"""Log-probabilities in OpenAI's two formats, within the extraction policy.

The policy holds here too, whatever an engine sends: no more alternatives than were asked for
(at most ``MAX_TOP``), two decimals, and nothing at all unless ``extraction.logprobs`` is on.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fortpoint.config import Extraction
from fortpoint.engine.protocol import Token
from fortpoint.errors import Unsupported

MAX_TOP = 5
_DECIMALS = 2
_LEAST = -9999.0  # OpenAI's word for "impossible"; JSON has no infinity
_BROKEN = "\ufffd"


class TopLogprob(msgspec.Struct, frozen=True):
    """``bytes`` is null where the token is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """``text_offset`` counts characters of the answer's tokens before each one."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


def require_allowed(n_logprobs: int | None, extraction: Extraction) -> int | None:
    """``n_logprobs`` as asked. Raises ``Unsupported`` when the policy gives none."""
    if n_logprobs is not None and not extraction.logprobs:
        raise Unsupported(
            "logprobs is not supported: log-probabilities are off by the extraction policy",
            param="logprobs",
        )
    return n_logprobs


def of_chat(tokens: Sequence[Token], n_top: int) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                text_of(token),
                rounded(token.logprob),
                _bytes(text_of(token)),
                [
                    TopLogprob(text, rounded(value), _bytes(text))
                    for text, value in (token.top or ())[:n_top]
                ],
            )
            for token in tokens
            if token.logprob is not None
        ]
    )


def of_completion(tokens: Sequence[Token], n_top: int, offset: int = 0) -> CompletionLogprobs:
    """``offset`` is where the first of these tokens begins."""
    texts = [text_of(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[t.logprob if t.logprob is None else rounded(t.logprob) for t in tokens],
        top_logprobs=[_likeliest(token, n_top) for token in tokens] if n_top else None,
        text_offset=offsets,
    )


def text_of(token: Token) -> str:
    return token.text if token.token is None else token.token


def rounded(logprob: float) -> float:
    """Two decimals, finite, never -0.0."""
    return max(_LEAST, round(logprob, _DECIMALS)) + 0.0


def _likeliest(token: Token, n_top: int) -> dict[str, float]:
    """OpenAI puts the chosen token among its alternatives."""
    likeliest = {text: rounded(value) for text, value in (token.top or ())[:n_top]}
    if token.logprob is not None:
        likeliest.setdefault(text_of(token), rounded(token.logprob))
    return likeliest


def _bytes(text: str) -> list[int] | None:
    return None if _BROKEN in text else list(text.encode())
