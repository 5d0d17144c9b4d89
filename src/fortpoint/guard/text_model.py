"""Scores text with hashed n-grams and one table of weights: no neural network, numpy only.

Text is folded (see ``canonical``), cut into byte 3- to 5-grams and word 1- to 3-grams, and
each is hashed into a table with one column a detector. A window's logit is the sum of its
entries over the square root of their number, so a long window counts for more than a short
one but does not win by length alone. A longer text is scored by overlapping windows of two
sizes, so that padding an attack with harmless text does not hide it.

    model = TextModel.load(Path("text_model.safetensors"))
    model.logits("Ignore all previous instructions").max(axis=0)   # [n_detectors]

Does not protect: encodings (base64, ROT, leetspeak) and paraphrases that share no vocabulary
with what it was trained on. It reads words, not meaning; the linear probes read the model.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fortpoint.errors import ModelError

# Window and stride in bytes: a paragraph, and a sentence or two that hide in one.
SCALES = ((600, 200), (200, 100))
# A sentence taken out of its paragraph must be clearer to count: a long harmless text has many.
SENTENCE_DISCOUNT = 1.0
NGRAMS = (3, 4, 5)

_PRIME = np.uint32(0x01000193)
_MIX = np.uint32(0x9E3779B1)
_SEPARATORS = re.compile(rb"[^a-z0\x80-\xff]+")
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
# Characters that print nothing and split words for a matcher but not for a reader.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0100-\U000e01ef]"
)
_TAGS = range(0xE0020, 0xE007F)
_MAX_FOLDS = 20_000

Float32 = NDArray[np.float32]


class _Folds(dict[int, str]):
    """Code point to what is read for it, filled as characters are met.

    Characters are decomposed one by one: ``unicodedata.normalize`` takes quadratic time over a
    long run of combining marks, so a whole text is never given to it.
    """

    def __missing__(self, code: int) -> str:
        if len(self) >= _MAX_FOLDS:
            self.clear()
        folded = self[code] = _fold(code)
        return folded


def _fold(code: int) -> str:
    """Compatibility form without marks; tags carry a hidden ASCII text, which is read."""
    if code in _TAGS:
        return chr(code - 0xE0000)
    parts = unicodedata.normalize("NFKD", chr(code))
    return _INVISIBLE.sub("", "".join(part for part in parts if not unicodedata.combining(part)))


_FOLDS = _Folds()


def canonical(text: str) -> bytes:
    """The text as its n-grams see it: lower case, one space between words, digits as 0.

    Compatibility characters are folded, accents, invisible characters and combining marks
    removed, hidden tag characters read. Any Unicode is accepted, lone surrogates included.
    """
    if not text.isascii():
        text = text.translate(_FOLDS)
    raw = text.lower().encode("utf-8", "replace").translate(_DIGITS)
    return b" " + _SEPARATORS.sub(b" ", raw).strip() + b" "


@dataclass(frozen=True)
class Features:
    """Hashed n-grams: ``hashes[i]`` starts at byte ``starts[i]`` of the canonical text."""

    hashes: NDArray[np.uint32]
    starts: NDArray[np.int64]
    n_bytes: int


def features(text: bytes) -> Features:
    """Every n-gram of a canonical text, as 32-bit hashes with the byte where it starts."""
    units = np.frombuffer(text, dtype=np.uint8).astype(np.uint32)
    hashes: list[NDArray[np.uint32]] = []
    starts: list[NDArray[np.int64]] = []
    positions = np.arange(len(units), dtype=np.int64)
    rolling = units
    for n in range(2, NGRAMS[-1] + 1):
        rolling = rolling[:-1] * _PRIME + units[n - 1 :]
        if n in NGRAMS:
            hashes.append(rolling ^ np.uint32(n))
            starts.append(positions[: len(rolling)])
    words = text.split()
    word = np.fromiter(map(zlib.crc32, words), dtype=np.uint32, count=len(words))
    word_starts = np.flatnonzero(units == 32)[: len(words)]
    gram = word
    for n in range(1, 4):
        if n > 1:
            gram = gram[:-1] * _PRIME ^ word[n - 1 :]
        if len(gram) == 0:
            break
        hashes.append(gram ^ np.uint32(0x5BD1E995 * n & 0xFFFFFFFF))
        starts.append(word_starts[: len(gram)])
    return Features(np.concatenate(hashes), np.concatenate(starts), len(text))


def buckets(hashes: NDArray[np.uint32], n_buckets: int) -> NDArray[np.uint32]:
    """Rows of a table of ``n_buckets`` (a power of two), well mixed."""
    mixed = (hashes ^ (hashes >> np.uint32(16))) * _MIX
    return mixed >> np.uint32(32 - n_buckets.bit_length() + 1)


def windows(n_bytes: int, scales: Sequence[tuple[int, int]] = SCALES) -> list[tuple[int, int]]:
    """Byte ranges that cover the text at each scale that it is long enough for."""
    ranges = []
    for size, stride in scales:
        last = max(n_bytes - size, 0)
        ranges += [(start, min(start + size, n_bytes)) for start in (*range(0, last, stride), last)]
    return list(dict.fromkeys(ranges))


@dataclass(frozen=True)
class TextModel:
    """``table`` is [n_buckets, n_detectors], ``bias`` [n_detectors].

    A table of int8 is kept as it is, with a ``scale`` [n_detectors] that its sums are taken by.
    """

    detectors: tuple[str, ...]
    table: Float32 | NDArray[np.int8]
    bias: Float32
    scale: Float32 | None = None

    @classmethod
    def load(cls, file: Path) -> TextModel:
        """Read a shipped table. Raises ``ModelError`` when it is not one."""
        try:
            with safe_open(file, framework="numpy") as tensors:
                detectors = tuple((tensors.metadata() or {}).get("detectors", "").split(","))
                table = tensors.get_tensor("table")
                bias = tensors.get_tensor("bias").astype(np.float32)
                rounded = table.dtype == np.int8
                scale = tensors.get_tensor("scale").astype(np.float32) if rounded else None
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the guard's text model {file.name} cannot be read") from error
        fits = table.ndim == 2 and table.shape[1] == len(detectors)
        columns = (bias,) if scale is None else (bias, scale)
        if not fits or any(one.shape != (len(detectors),) for one in columns):
            raise ModelError(f"the guard's text model {file.name} has the wrong shape")
        if len(table) < 2 or len(table) & (len(table) - 1):
            raise ModelError(f"the guard's text model {file.name} has the wrong shape")
        if not all(np.isfinite(one).all() for one in (table, *columns)):
            raise ModelError(f"the guard's text model {file.name} holds values that are not finite")
        return cls(detectors, table if rounded else table.astype(np.float32), bias, scale)

    def logits(self, text: str) -> Float32:
        """[n_windows, n_detectors], scale by scale. An empty text has one window."""
        found = features(canonical(text))
        values = self.table[buckets(found.hashes, len(self.table))]
        order = np.argsort(found.starts, kind="stable")
        sums = np.zeros((len(values) + 1, values.shape[1]))
        np.cumsum(values[order], axis=0, out=sums[1:])
        ranges = np.array(windows(found.n_bytes))
        at = np.searchsorted(found.starts[order], ranges)
        n = np.maximum(at[:, 1] - at[:, 0], 1)[:, None]
        totals = sums[at[:, 1]] - sums[at[:, 0]]
        if self.scale is not None:
            totals = totals * self.scale
        logits = totals / np.sqrt(n) + self.bias
        sizes = ranges[:, 1] - ranges[:, 0]
        logits[sizes < sizes[0]] -= SENTENCE_DISCOUNT
        return np.asarray(logits, dtype=np.float32)
