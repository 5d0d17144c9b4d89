"""A library's own training loop, which waits between its turns when it asks for a batch.

    {"steps": 30}                                 on standard input
    {"seconds": 12.6}                             to the descriptor `results`, when done
    {"fvu": .21, "l0": 32.0, "n_dead": 3}         after the last step of all

The first line out is ``{"versions": {...}}``, when the loop asks for its first batch. Runs in the
peer's own environment: the standard library, numpy and torch alone are imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np
import torch

ROWS = 2048

Reconstruct = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``x`` ``[n, d]`` to what the dictionary makes of it, and activations ``[n, d_sae]``."""


class Turns:
    """An iterator over batches, float32 ``[batch, d]``; each is read once, in the file's order.

    ``given`` are the runner's settings: ``train`` and ``held_out`` (files), ``batch``,
    ``n_steps``, ``threads``, ``results`` (a descriptor). It ends after ``n_steps``.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.given = json.loads(sys.argv[1])
        self._results = os.fdopen(self.given["results"], "w")
        torch.set_num_threads(self.given["threads"])
        torch.manual_seed(0)
        self._rows = np.load(self.given["train"], mmap_mode="r")
        self._packages = packages
        self._left = self._done = 0
        self._started: float | None = None

    @property
    def d_in(self) -> int:
        return self._rows.shape[1]

    @property
    def n_steps(self) -> int:
        return self.given["n_steps"]

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> torch.Tensor:
        if self._left == 0:
            self._report()
            if self._done == self.n_steps:
                raise StopIteration
            self._left = self._wait()
            self._started = time.perf_counter()
        first = self._done * self.given["batch"]
        self._left -= 1
        self._done += 1
        return torch.from_numpy(np.array(self._rows[first : first + self.given["batch"]]))

    def finish(self, reconstruct: Reconstruct) -> None:
        """Measure on the held-out rows: the share of variance that is not explained."""
        self.write(measure(reconstruct, np.load(self.given["held_out"], mmap_mode="r")))

    def write(self, result: dict) -> None:
        self._results.write(json.dumps(result) + "\n")
        self._results.flush()

    def _report(self) -> None:
        if self._started is None:
            versions = {name: metadata.version(name) for name in self._packages}
            self.write({"versions": versions})
        else:
            self.write({"seconds": time.perf_counter() - self._started})

    def _wait(self) -> int:
        line = sys.stdin.readline()
        if not line:
            sys.exit("nobody asks any more")
        return min(json.loads(line)["steps"], self.n_steps - self._done)


@torch.no_grad()
def measure(reconstruct: Reconstruct, rows: np.ndarray) -> dict:
    """FVU over all rows at once, activations a token, and features that were never active."""
    error = square = n_active = 0.0
    total, seen = torch.zeros(rows.shape[1], dtype=torch.float64), None
    for first in range(0, len(rows) - ROWS + 1, ROWS):
        x = torch.from_numpy(np.array(rows[first : first + ROWS]))
        made, acts = reconstruct(x)
        error += float((made.float() - x).double().square().sum())
        square += float(x.double().square().sum())
        total += x.double().sum(0)
        active = acts.to_dense() > 0 if acts.is_sparse else acts > 0
        n_active += float(active.sum())
        seen = active.any(0) if seen is None else seen | active.any(0)
    n = len(rows) // ROWS * ROWS
    variance = square - float(total.square().sum()) / n
    return {"fvu": error / variance, "l0": n_active / n, "n_dead": int((~seen).sum())}
