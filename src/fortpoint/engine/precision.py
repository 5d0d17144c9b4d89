"""Which precision computes faster on this machine: measured, not guessed.

bfloat16 halves memory and is far faster where the processor multiplies it in hardware, and
several times slower where it does not.
"""

from __future__ import annotations

import time

import msgspec
import torch
import torch.nn.functional as F

_SHAPE = (64, 576, 1536)  # rows, inputs, outputs of one product
_REPEATS = 8


class Measurement(msgspec.Struct, frozen=True):
    """Seconds for the same products in each precision, and the faster one's name."""

    float32_s: float
    bfloat16_s: float

    @property
    def faster(self) -> str:
        return "float32" if self.float32_s <= self.bfloat16_s else "bfloat16"


def measure() -> Measurement:
    """Time both; takes some tens of milliseconds."""
    return Measurement(_time(torch.float32), _time(torch.bfloat16))


def choose(name: str) -> torch.dtype:
    """The dtype that configuration's ``engine.dtype`` stands for here."""
    chosen = measure().faster if name == "auto" else name
    return torch.float32 if chosen == "float32" else torch.bfloat16


@torch.inference_mode()
def _time(dtype: torch.dtype) -> float:
    rows, d_in, d_out = _SHAPE
    x, weight = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        F.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
