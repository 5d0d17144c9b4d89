"""Tokens of like meaning put into classes, by the rows of the model's own unembedding.

A rule may then say "after a month" and hold for a month that it was not learned from. A class
has no name of its own; it is shown by its most typical members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.understanding.k_means import assign, k_means, unit_rows

N_CLASSES = 512
_SHOWN = 3
_LEAST_SIZE = 4


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """``of_token`` int32 ``[n_vocab]``, -1 where a token has none; ``names`` one for each."""

    of_token: NDArray[np.int32]
    names: tuple[str, ...]

    @classmethod
    def none(cls, n_vocab: int) -> TokenClasses:
        return cls(np.full(n_vocab, -1, np.int32), ())

    @classmethod
    def stored(cls, names: tuple[str, ...], of_token: bytes) -> TokenClasses:
        """As an index's header holds them. Raises ``ModelError`` for one that is torn."""
        if len(of_token) % 2:
            raise ModelError("the index's classes of tokens are torn; describe it again")
        numbers = np.frombuffer(of_token, "<i2").astype(np.int32)
        if len(numbers) and not -1 <= numbers.min() <= numbers.max() < max(len(names), 1):
            raise ModelError("the index's classes of tokens have no names; describe it again")
        return cls(numbers, names)

    @classmethod
    def learn(
        cls,
        readout: NDArray[np.float32],
        counts: NDArray[np.int64],
        texts: tuple[str, ...],
        n_classes: int = N_CLASSES,
        seed: int = 0,
    ) -> TokenClasses:
        """From ``readout`` ``[n_vocab, d_model]`` and how often each token occurs.

        Only tokens that occur are put into classes, four or more to each on average. The mean
        direction, which all tokens share, is taken away first.
        """
        seen = np.flatnonzero(counts)
        if len(seen) == 0:
            return cls.none(len(texts))
        rows = readout[seen]
        x = unit_rows(rows - rows.mean(axis=0))
        centers = k_means(x, max(1, min(n_classes, len(seen) // _LEAST_SIZE)), seed)
        nearest, cosines = assign(x, centers)
        of_token = np.full(len(texts), -1, np.int32)
        of_token[seen] = nearest
        typical = cosines * np.log1p(counts[seen])
        names = [
            _name(seen[nearest == number], typical[nearest == number], texts)
            for number in range(len(centers))
        ]
        return cls(of_token, tuple(names))


def _name(tokens: NDArray[np.int64], typical: NDArray[np.float64], texts: tuple[str, ...]) -> str:
    """The most typical members, each word once."""
    shown: dict[str, str] = {}
    for token in tokens[np.argsort(-typical, kind="stable")].tolist():
        written = texts[token].strip() or repr(texts[token])[1:-1]
        shown.setdefault(written.lower(), written)
        if len(shown) == _SHOWN:
            break
    return "/".join(shown.values())
