"""Tokens of like meaning put into classes, by the rows of the model's own unembedding.

A rule may then say "after a month" and hold for a month that it was not learned from. A class
has no name of its own; it is shown by its most typical members.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.understanding.k_means import assign, k_means, unit_rows
from fortpoint.features.understanding.writing import visible

N_CLASSES = 512
_SHOWN = 3
_LEAST_SIZE = 4
_TOO_COMMON = 0.01
_PARTS, _MOST_PARTS = 100, 48
_BLANKS = re.compile(" +")


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
        direction, which all tokens share, is taken away first. A class that has more than a
        hundredth of all text (words like "the" are alike by being common) is taken apart.
        """
        seen = np.flatnonzero(counts)
        if len(seen) == 0:
            return cls.none(len(texts))
        own, cosines = _grouped(readout[seen], n_classes, seed)
        share = np.bincount(own, weights=counts[seen]) / counts.sum()
        for number in np.flatnonzero(share > _TOO_COMMON).tolist():
            members = np.flatnonzero(own == number)
            n = min(_MOST_PARTS, 1 + round(float(share[number]) * _PARTS))
            parts, cosines[members] = _grouped(readout[seen[members]], n, seed)
            own[members] = np.where(parts == 0, number, own.max() + parts)
        typical = cosines * np.log1p(counts[seen])
        order = np.argsort(-typical, kind="stable")
        names = [_name(seen[order[own[order] == n]], texts) for n in range(int(own.max()) + 1)]
        of_token = np.full(len(texts), -1, np.int32)
        of_token[seen] = own
        return cls(of_token, tuple(names))


def _grouped(
    rows: NDArray[np.float32], n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The group of each row, numbered without a gap, and its cosine with the group's centre."""
    x = unit_rows(rows - rows.mean(axis=0))
    own, cosines = assign(x, k_means(x, max(1, min(n, len(x) // _LEAST_SIZE)), seed))
    return np.unique(own, return_inverse=True)[1], cosines


def _name(tokens: NDArray[np.int64], texts: tuple[str, ...]) -> str:
    """The most typical members, which come first, each word once."""
    shown: dict[str, str] = {}
    for token in tokens.tolist():
        written = texts[token].strip() or _BLANKS.sub("␣", visible(texts[token]))
        shown.setdefault(written.lower(), written)
        if len(shown) == _SHOWN:
            break
    return "/".join(shown.values())
