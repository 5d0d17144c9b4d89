"""Fills an activation store: text in, shards of the residual stream out.

The forward pass ends at the last layer wanted. Texts are cut into windows of ``context``
tokens and computed in random order; a harvest that stops goes on at the shard it had not
finished, and one that would not fit its byte budget is cut to what fits.

    plan, windows = prepare(documents, settings, stream, model="smollm2-135m", digest="sha256:...")
    harvest(folder, plan, windows, stream, progress)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.activations import ActivationStore, Plan, begin, write_shard
from fortpoint.features.corpus import Document

MIN_TOKENS = 20_000
_BATCH_TOKENS = 4096
_META_BYTES = 17  # of a token: its places and one norm

Progress = Callable[[str, int, int], None]


class Stream(Protocol):
    """What is needed of the engine's ``ResidualStream``."""

    @property
    def d_model(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    def check_layers(self, layers: Sequence[int]) -> None: ...

    def read(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> dict[int, NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Settings:
    """``max_bytes`` bounds what is written; ``n_tokens`` None takes all text there is."""

    layers: tuple[int, ...]
    context: int = 512
    n_tokens: int | None = None
    max_bytes: int = 32 << 30
    shard_tokens: int = 65_536
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Window:
    """At most ``context`` tokens of one document."""

    document: int
    tokens: NDArray[np.int32]
    roles: NDArray[np.uint8]


def prepare(
    documents: Sequence[Document], settings: Settings, stream: Stream, model: str, digest: str
) -> tuple[Plan, list[Window]]:
    """What will be harvested. Raises ``InvalidRequest`` for too little text or a bad layer."""
    stream.check_layers(settings.layers)
    if not settings.layers or len(set(settings.layers)) != len(settings.layers):
        raise InvalidRequest("name each layer to harvest once", param="layers")
    if not 2 <= settings.context <= stream.max_context:
        raise InvalidRequest(f"context is a number from 2 to {stream.max_context}", param="context")
    token_bytes = len(settings.layers) * (stream.d_model * 2) + _META_BYTES
    most = settings.max_bytes // token_bytes
    if settings.n_tokens is not None:
        most = min(most, settings.n_tokens)
    windows = list(_cut(documents, settings.context, most))
    n_tokens = sum(len(window.tokens) for window in windows)
    if n_tokens < MIN_TOKENS:
        raise InvalidRequest(
            f"these are {n_tokens} tokens of text; features need at least {MIN_TOKENS}, and "
            "a million or more to be any good"
        )
    digest_of = hashlib.sha256()
    for window in windows:
        digest_of.update(window.tokens.tobytes())
        digest_of.update(window.roles.tobytes())
    plan = Plan(
        model=model,
        digest=digest,
        d_model=stream.d_model,
        layers=settings.layers,
        context=settings.context,
        seed=settings.seed,
        n_tokens=n_tokens,
        shard_tokens=settings.shard_tokens,
        corpus=digest_of.hexdigest(),
    )
    return plan, windows


def harvest(
    folder: Path, plan: Plan, windows: Sequence[Window], stream: Stream, progress: Progress
) -> ActivationStore:
    """Compute what ``folder`` does not have yet. Raises ``StorageError``, ``ModelError``."""
    n_there = begin(folder, plan)
    done = 0
    for number, shard in enumerate(_shards(windows, plan.shard_tokens)):
        if number >= n_there:
            _harvest_shard(folder, number, shard, stream, plan.layers)
        done += sum(len(window.tokens) for window in shard)
        progress("harvest", done, plan.n_tokens)
    return ActivationStore(folder)


def _cut(documents: Sequence[Document], context: int, most: int) -> Iterator[Window]:
    n_tokens = 0
    for number, document in enumerate(documents):
        for start in range(0, len(document), context):
            tokens = document.tokens[start : start + context]
            n_tokens += len(tokens)
            if n_tokens > most:
                return
            if len(tokens) > 1:
                yield Window(number, tokens, document.roles[start : start + context])


def _shards(windows: Sequence[Window], shard_tokens: int) -> Iterator[list[Window]]:
    shard: list[Window] = []
    n_tokens = 0
    for window in windows:
        if shard and n_tokens + len(window.tokens) > shard_tokens:
            yield shard
            shard, n_tokens = [], 0
        shard.append(window)
        n_tokens += len(window.tokens)
    if shard:
        yield shard


def _harvest_shard(
    folder: Path, number: int, windows: Sequence[Window], stream: Stream, layers: Sequence[int]
) -> None:
    sizes = [len(window.tokens) for window in windows]
    parts: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    for batch in _batches(windows):
        read = stream.read([window.tokens.tolist() for window in batch], layers)
        for layer, x in read.items():
            if not np.isfinite(x).all():
                raise ModelError(
                    f"the activations of layer {layer} are not finite: the model is damaged, or "
                    "its precision too low"
                )
            parts[layer].append(x)
    places = {
        "tokens": np.concatenate([window.tokens for window in windows]),
        "document": np.repeat([window.document for window in windows], sizes),
        "position": np.concatenate([np.arange(size) for size in sizes]),
        "role": np.concatenate([window.roles for window in windows]),
    }
    residual = {layer: np.concatenate(rows) for layer, rows in parts.items()}
    write_shard(folder, number, places, residual)


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    batch: list[Window] = []
    n_tokens = 0
    for window in windows:
        batch.append(window)
        n_tokens += len(window.tokens)
        if n_tokens >= _BATCH_TOKENS:
            yield batch
            batch, n_tokens = [], 0
    if batch:
        yield batch
