"""Which kernels multiply fastest on this machine: measured, not guessed.

bfloat16 is far faster where the processor multiplies it in hardware, and several times slower
where it does not. Four-bit weights win for few rows, where memory is the limit, but only a
checkpoint that was made of such weights keeps its values in them: ``auto`` never rounds a
model, ``int8`` and ``int4`` do as they are told.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from fortpoint.engine.linear import KernelName, Plan, fits_int4, int4_error, kernel
from fortpoint.errors import ModelError

Precision = Literal["auto", "float32", "bfloat16", "int8", "int4"]

ROWS = (1, 2, 4, 8, 16, 64)
_SHAPE = (1536, 576)  # outputs, inputs of one product
_N_MATRICES = 12  # together larger than a core's own cache
_REPEATS = 4
_LOSSLESS = 1e-3  # relative error below bfloat16's own rounding (2^-9)


class Measurement(msgspec.Struct, frozen=True):
    """Seconds for the same products with each kernel, at ``ROWS`` rows."""

    seconds: dict[str, tuple[float, ...]]

    @property
    def many(self) -> KernelName:
        """The faster kernel for many rows."""
        return "float32" if self._of("float32")[-1] <= self._of("bfloat16")[-1] else "bfloat16"

    def few_rows(self, few: KernelName, many: KernelName) -> int:
        """Up to how many rows ``few`` beats ``many``; 0 for never."""
        wins = 0
        for rows, short, long in zip(ROWS, self._of(few), self._of(many), strict=True):
            if short >= long:
                break
            wins = rows
        return wins

    def _of(self, name: KernelName) -> tuple[float, ...]:
        return self.seconds[name]


def measure(kernels: Iterable[KernelName] = ("float32", "bfloat16", "int8", "int4")) -> Measurement:
    """Time each kernel; takes some tenths of a second."""
    return Measurement({name: _time(name) for name in kernels})


def choose(name: Precision, folder: Path) -> Plan:
    """The plan that configuration's ``engine.dtype`` stands for here, for this checkpoint."""
    if name == "float32" or name == "bfloat16":  # noqa: PLR1714 - narrows the type
        return plain(name)
    took = measure()
    many = took.many
    few: KernelName = name if name != "auto" else "int4" if is_int4(folder) else many
    rounded: Literal["int8", "int4"] | None = None if name == "auto" else name
    n_rows = 0 if few == many else took.few_rows(few, many)
    dtype = torch.float32 if many == "float32" else torch.bfloat16
    return Plan(dtype, many, few if n_rows else many, n_rows, rounded)


def plain(name: Literal["float32", "bfloat16"]) -> Plan:
    """One kernel for all rows."""
    return Plan(torch.float32 if name == "float32" else torch.bfloat16, name, name, 0)


def is_int4(folder: Path) -> bool:
    """True when the checkpoint's matrices lie on the four-bit grid: nothing is lost by it.

    Looks at the first block's matrices. Raises ``ModelError`` if they cannot be read.
    """
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names = [
                name
                for name in file.keys()  # noqa: SIM118 - not a dict
                if ".layers.0." in name and name.endswith("_proj.weight")
            ]
            matrices = [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.safetensors cannot be used: {type(error).__name__}") from None
    return bool(matrices) and all(
        fits_int4(matrix) and int4_error(matrix) < _LOSSLESS for matrix in matrices
    )


@torch.inference_mode()
def _time(name: KernelName) -> tuple[float, ...]:
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    products = [kernel(name, torch.ones(_SHAPE), dtype) for _ in range(_N_MATRICES)]
    seconds = []
    for rows in ROWS:
        x, best = torch.ones(rows, _SHAPE[1], dtype=dtype), float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for product in products:
                product(x)
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    return tuple(seconds)
