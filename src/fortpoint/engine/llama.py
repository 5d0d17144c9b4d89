"""The Llama family on the compiled forward pass: a ``Model``.

    model = Llama.load(folder, precision, max_context=4096, kv_bytes=192 << 20, threads=2)
    result = model.forward(Step(tokens, spans, logit_rows=[0], tap_layers=(15,)))

What is computed is in ``compiled/``; weights are packed in ``weights.py``, and each step is
written down for the program in ``pass_table.py``. Matrices are held as ``precision`` says; the
residual stream, norms and softmax are float32; keys and values are bfloat16, or float32 where
all matrices are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fortpoint.engine.architecture import Architecture
from fortpoint.engine.checkpoint import Checkpoint
from fortpoint.engine.compiled.attention import BLOCK
from fortpoint.engine.compiled.forward import forward_pass, row_programs
from fortpoint.engine.compiled.pace import Pace
from fortpoint.engine.compiled.team import Team
from fortpoint.engine.compiled.vector import instructions
from fortpoint.engine.kv_cache import KVCache, KVPool, KVShape
from fortpoint.engine.model import Floats, Result, Span, Step
from fortpoint.engine.pass_table import PassTable
from fortpoint.engine.precision import Precision
from fortpoint.engine.weights import ModelWeights


class Llama:
    """Weights and the forward pass. One thread calls it; ``close`` ends the others."""

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        max_context: int,
        kv_bytes: int,
        threads: int,
    ) -> None:
        self._architecture = architecture
        self._weights = weights
        kinds = frozenset(matrix.kind for matrix in weights.matrices)
        half = kinds != {"float32"}
        heads = (architecture.n_layers, architecture.n_kv_heads, architecture.head_dim)
        self._pool = KVPool(KVShape(*heads, half), kv_bytes)
        self.max_context = min(max_context, architecture.max_positions, self._pool.n_tokens)
        self._team = Team(threads)
        self._pace = Pace(threads)
        self._table = PassTable(architecture, weights, self._pool, self.max_context, threads)
        self._program = forward_pass(kinds, half, instructions())

    @classmethod
    def load(
        cls, folder: Path, precision: Precision, max_context: int, kv_bytes: int, threads: int
    ) -> Llama:
        """Read the checkpoint; matrices are packed one by one. Raises ``ModelError``."""
        architecture = Architecture.load(folder)
        with ThreadPoolExecutor(1, "compile") as beside:
            compiling = beside.submit(row_programs)
            weights = ModelWeights.read(Checkpoint(folder), architecture, precision)
            compiling.result()
        return cls(architecture, weights, max_context, kv_bytes, threads)

    @property
    def architecture(self) -> str:
        return self._architecture.model_type

    @property
    def precision(self) -> str:
        kinds = {matrix.kind: None for matrix in self._weights.matrices}
        return " and ".join(reversed(kinds))

    @property
    def d_model(self) -> int:
        return self._architecture.d_model

    @property
    def n_layers(self) -> int:
        return self._architecture.n_layers

    @property
    def vocab_size(self) -> int:
        return self._architecture.vocab_size

    def new_cache(self) -> KVCache:
        return KVCache(self._pool)

    def close(self) -> None:
        self._team.close()

    def normed(self, x: Floats) -> Floats:
        """See ``Model.normed``."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True) + self._architecture.norm_eps
        normed: Floats = (x / np.sqrt(mean_square) * self._weights.final_norm).astype(np.float32)
        return normed

    def forward(self, step: Step) -> Result:
        """See ``Model.forward``."""
        caches = [_own(span) for span in step.spans]
        self._check(step, caches)
        n_rows = len(step.tokens)
        n_threads = self._pace.choose(n_rows)
        self._table.write(step, caches, n_threads)
        address, started = self._table.address, time.perf_counter()
        self._team.run(lambda thread: self._program(address, thread), n_threads)
        self._pace.note(n_rows, n_threads, time.perf_counter() - started)
        for span, cache in zip(step.spans, caches, strict=True):
            cache.length += span.end - span.start
        return self._table.result(step)

    def _check(self, step: Step, caches: Sequence[KVCache]) -> None:
        """The program reads memory by these numbers: a tokenizer may name tokens that the
        embedding lacks. Raises ``ValueError``; nothing has been computed then."""
        for span, cache in zip(step.spans, caches, strict=True):
            end = cache.length + span.end - span.start
            if end > min(len(cache.blocks) * BLOCK, self.max_context):
                raise ValueError("a sequence has no room for its rows")
        n_rows, layers = len(step.tokens), (*step.tap_layers, step.last_layer or 0)
        inside = (
            0 <= min(step.tokens) <= max(step.tokens) < self.vocab_size
            and all(0 <= row < n_rows for row in step.logit_rows)
            and all(0 <= layer < self.n_layers for layer in layers)
            and [span.start for span in step.spans] == [0, *(s.end for s in step.spans[:-1])]
            and step.spans[-1].end == n_rows
        )
        if not inside:
            raise ValueError("a step names a token, row or layer that the model does not have")


def _own(span: Span) -> KVCache:
    if not isinstance(span.cache, KVCache):
        raise TypeError("this cache belongs to another model")
    return span.cache
