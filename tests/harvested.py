"""A harvest of made-up activations whose features are known: sums of few planted directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fortpoint.features import activations
from fortpoint.features.activations import ActivationStore, Plan

D_MODEL = 32
N_PLANTED = 48
LAYER = 1


def planted(n: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``n`` rows, each the sum of three of the planted directions (and these, unit rows)."""
    directions = np.random.default_rng(7).standard_normal((N_PLANTED, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    random = np.random.default_rng(seed)
    rows = np.full(D_MODEL, 0.5) + 0.02 * random.standard_normal((n, D_MODEL))
    for _ in range(3):
        which = random.integers(0, N_PLANTED, n)
        rows += (2 + random.random(n))[:, None] * directions[which]
    return rows.astype(np.float32), directions.astype(np.float32)


def plan(n_tokens: int, layers: tuple[int, ...] = (LAYER,)) -> Plan:
    return Plan(
        model="tiny",
        digest="sha256:0",
        d_model=D_MODEL,
        layers=layers,
        context=64,
        seed=0,
        n_tokens=n_tokens,
        shard_tokens=2048,
        corpus="0",
    )


def store(folder: Path, n_shards: int = 6, n_rows: int = 2048, window: int = 64) -> ActivationStore:
    """Planted rows in texts of ``window`` tokens; the first of each is a sink of great length."""
    activations.begin(folder, plan(n_shards * n_rows))
    for number in range(n_shards):
        rows, _ = planted(n_rows, seed=number)
        position = np.arange(n_rows) % window
        rows[position == 0] *= 200
        places = {
            "tokens": np.random.default_rng(number).integers(0, 256, n_rows),
            "document": number * (n_rows // window) + np.arange(n_rows) // window,
            "position": position,
            "role": np.ones(n_rows),
        }
        activations.write_shard(folder, number, places, {LAYER: rows})
    return ActivationStore(folder)
