"""A lease's carrier: one standard normal number for each marked weight, made from its key.

    carrier = Carrier(lease_key, "model.layers.0.mlp.up_proj.weight")
    carrier.values(0, 1000)      # float32, the same on every machine
    carrier.dot(psi)             # their sum of products with ``psi``, without keeping them

AES-256 in counter mode under a key of this lease and tensor alone gives 16 bits a weight, and a
table turns them into numbers: the mean of a standard normal within each of 65,536 slices of
equal probability, cut towards zero at 2^-16. Both steps only ever draw values together, so for
any fixed unit vector v the sum <v, k> is sub-Gaussian with variance at most one:

    P(<v, k> >= t) <= exp(-t^2 / 2)        exactly, for every t and every length

(Jensen's inequality on the moment generating function, then Chernoff's bound.) Its variance is
.99999 and its law is the normal one to within what 10,000 keys can show.

Not protected here: the key. Who has it can subtract the mark.
"""

from __future__ import annotations

import functools
import math
import struct
from statistics import NormalDist
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_LEVELS = 1 << 16
_BYTES = 2  # a weight
_BLOCK = 16  # bytes of AES
_CHUNK = 1 << 18  # weights at a time: their bits and numbers stay in the core's cache
_INFO = b"fortpoint carrier v1\0"


class Carrier:
    """The numbers of one lease for one tensor, in the tensor's row-major order."""

    def __init__(self, lease_key: bytes, tensor: str) -> None:
        self._key = HKDFExpand(SHA256(), 32, _INFO + tensor.encode()).derive(lease_key)

    def values(self, start: int, n: int) -> Floats:
        """Numbers ``start`` to ``start + n``; ``start`` is a multiple of eight."""
        return table()[self._bits(start, n)]

    def dot(self, psi: Floats, start: int = 0) -> float:
        """``<psi, k>`` for ``psi`` ``[n]`` at the tensor's weights from ``start`` on."""
        multiply, numbers, total = _compiled(), table(), 0.0
        for first in range(0, len(psi), _CHUNK):
            part = psi[first : first + _CHUNK]
            total += multiply(self._bits(start + first, len(part)), part, numbers)
        return total

    def _bits(self, start: int, n: int) -> NDArray[np.uint16]:
        if start * _BYTES % _BLOCK:
            raise ValueError("a carrier is read from a multiple of eight weights")
        counter = struct.pack(">QQ", 0, start * _BYTES // _BLOCK)
        stream = Cipher(algorithms.AES(self._key), modes.CTR(counter)).encryptor()
        return np.frombuffer(stream.update(_zeros(n * _BYTES)), "<u2")


@functools.cache
def table() -> Floats:
    """``[65536]``: the mean of a standard normal in each slice, cut towards zero."""
    normal = NormalDist()
    inner = [normal.inv_cdf(i / _LEVELS) for i in range(1, _LEVELS // 2)]
    edges = np.array([-math.inf, *inner, 0.0])
    density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    lower = np.trunc(_LEVELS * (density[:-1] - density[1:]) * _LEVELS) / _LEVELS
    numbers = np.concatenate([lower, -lower[::-1]]).astype(np.float32)
    numbers.flags.writeable = False
    return numbers


@functools.lru_cache(maxsize=8)
def _zeros(n: int) -> bytes:
    return bytes(n)


def _multiply(bits: Any, psi: Any, numbers: Any) -> Any:
    total = 0.0
    for first in range(0, len(bits), 4096):
        part: Any = np.float32(0.0)
        for i in range(first, min(first + 4096, len(bits))):
            part += psi[i] * numbers[bits[i]]
        total += part
    return total


@functools.cache
def _compiled() -> Any:
    from numba import njit

    return njit(nogil=True, fastmath={"nsz", "contract", "reassoc"})(_multiply)
