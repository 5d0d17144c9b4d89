"""One step of learning a dictionary of features, and the state that it changes.

The encoder's product runs in bytes and only says where to look; the activations of what it
finds, the choice among them, the reconstruction and all gradients are float32, over few pairs
(``kernels.py``). So a step costs little more than the product.

    trainer = Trainer(settings, d_in=576, n_steps=5000)
    trainer.begin(sample)  # [n, d_in]: where the decoder's bias starts
    for x in batches:      # float32 [batch, d_in], centred and scaled to a mean square of 1
        trainer.step(x)

Sources: TopK and the auxiliary loss, arXiv 2406.04093; BatchTopK, 2412.06410; JumpReLU,
2407.14435; Matryoshka, 2503.17547.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from fortpoint.errors import ModelError
from fortpoint.features.training import kernels
from fortpoint.features.training.settings import Settings

Floats = NDArray[np.float32]
Reduce = Callable[[Sequence[Floats]], None]
"""Makes each array the mean of all processes' own, in place."""

Task = Callable[[int, int], None]
"""Works on rows or features from the first to before the last."""

_BETAS = np.array([0.9, 0.999], np.float32)
_CHUNKS_PER_THREAD = 4
_CHUNKS_OF_PRODUCT = 1  # each reads all of the encoder
_MAX_DEAD_AT_ONCE = 512
_SPARE = 1.25  # candidates for one that is kept: the rough order is not the exact one
_BELOW = np.float32(0.93)  # the guess, of what the last batch would have needed
_ROUGHLY = np.float32(0.97)
_MATRICES = ("W_enc", "W_dec")
_VECTORS = ("b_enc", "b_dec", "threshold")


@dataclass(frozen=True)
class Metrics:
    """Of one batch: ``fvu`` is the share of variance not explained, ``l0`` active a token."""

    fvu: float
    l0: float
    n_dead: int
    rate: float


class Workers:
    """Shares a kernel's rows or features out to threads."""

    def __init__(self, n_threads: int | None = None) -> None:
        self.n_threads = n_threads or os.cpu_count() or 1
        # Each thread's own calls of torch stay in it: a pool of torch's beside this one would
        # wait busily for its next work, on the cores that the kernels need.
        self._pool = ThreadPoolExecutor(
            self.n_threads, "kernels", initializer=torch.set_num_threads, initargs=(1,)
        )

    def run(self, task: Task, n: int, chunks_per_thread: int = _CHUNKS_PER_THREAD) -> None:
        """``task(first, last)`` for parts of ``n`` that follow one another."""
        n_chunks = self.n_threads * chunks_per_thread
        edges = np.linspace(0, n, n_chunks + 1).astype(int).tolist()
        futures = [
            self._pool.submit(task, first, last) for first, last in pairwise(edges) if first < last
        ]
        for future in futures:
            future.result()

    def close(self) -> None:
        self._pool.shutdown()


class Pairs:
    """Which features are active at which token of a batch, in room that is used again."""

    def __init__(self, batch: int, d_sae: int) -> None:
        self.cols = np.empty((batch, d_sae), np.int32)
        self.values = np.zeros((batch, d_sae), np.float32)
        self.slopes = np.zeros((batch, d_sae), np.float32)
        self.counts = np.zeros(batch, np.int64)

    @property
    def used(self) -> NDArray[np.bool_]:
        """``[n, most]``: which places hold a pair."""
        mask: NDArray[np.bool_] = np.arange(self.counts.max(initial=0)) < self.counts[:, None]
        return mask


class Rough:
    """A batch's activations as products of bytes, in room that is used again."""

    def __init__(self, batch: int, d_sae: int, d_in: int) -> None:
        self.sums = np.empty((batch, d_sae), np.int32)
        self.row_scales = np.empty(batch, np.float32)
        self.own_scales = np.empty(d_sae, np.float32)
        self._rows = np.empty((batch, d_in), np.int8)
        self._weights = np.empty((d_sae, d_in), np.int8)
        self._rows_seen = torch.from_numpy(self._rows)
        self._weights_seen = torch.from_numpy(self._weights)
        self._sums_seen = torch.from_numpy(self.sums)

    def narrow(self, W_enc: Floats, first: int, last: int) -> None:
        """The encoder's rows ``first`` to ``last`` in bytes."""
        kernels.quantise(W_enc, self._weights, self.own_scales, first, last)

    def fill(self, x: Floats, first: int, last: int) -> None:
        """The sums of rows ``first`` to ``last`` with every feature."""
        kernels.quantise(x, self._rows, self.row_scales, first, last)
        with torch.inference_mode():
            rows, sums = self._rows_seen[first:last], self._sums_seen[first:last]
            torch._int_mm(rows, self._weights_seen.T, out=sums)


class Trainer:
    """Parameters, Adam's moments, and ``step``. One thread calls it."""

    def __init__(
        self,
        settings: Settings,
        d_in: int,
        n_steps: int,
        reduce: Reduce | None = None,
        n_threads: int | None = None,
    ) -> None:
        settings.check()
        self.settings, self.d_in, self.n_steps = settings, d_in, n_steps
        self.n_done = 0
        self._reduce = reduce
        self._workers = Workers(n_threads)
        self._blas = ThreadpoolController()
        random = np.random.default_rng(settings.seed)
        rows = random.standard_normal((settings.d_sae, d_in), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.parameters: dict[str, Floats] = {
            "W_enc": rows.copy(),
            "W_dec": rows,
            "b_enc": np.zeros(settings.d_sae, np.float32),
            "b_dec": np.zeros(d_in, np.float32),
            "threshold": np.full(settings.d_sae, 0.05, np.float32),
        }
        self._moments = {
            f"{kind}.{name}": np.zeros_like(value)
            for name, value in self.parameters.items()
            for kind in ("mean", "square")
        }
        self._idle = np.zeros(settings.d_sae, np.int64)  # tokens since a feature was active
        self._hits = np.zeros(settings.d_sae, np.int64)
        self._squares = np.zeros(settings.d_sae, np.float32)
        self._limit = 0.0  # activations below it are not among the k largest of a batch
        self._floor = np.float32(0.0)
        self._pairs = Pairs(settings.batch, settings.d_sae)
        self._gradients = {name: np.zeros_like(v) for name, v in self.parameters.items()}
        self._ends = np.array(settings.ends, np.int64)
        self._errors = np.zeros((settings.batch, len(settings.ends), d_in), np.float32)
        self._losses = np.zeros(settings.batch, np.float32)
        self._rough = Rough(settings.batch, settings.d_sae, d_in)

    def begin(self, sample: Floats) -> None:
        """Put the decoder's bias at the geometric median of ``sample`` ``[n, d_in]``."""
        self.parameters["b_dec"][:] = geometric_median(sample)

    def step(self, x: Floats) -> Metrics:
        """Learn from ``x`` ``[batch, d_in]``. Raises ``ModelError`` when it is not finite."""
        # A thread of BLAS goes on waiting busily after its work, on a core that is needed.
        with self._blas.limit(limits=1, user_api="blas"):
            return self._step(x)

    def _step(self, x: Floats) -> Metrics:
        centred = np.ascontiguousarray(x - self.parameters["b_dec"], np.float32)
        limit = self._find(centred)
        near = self._gate() if self.settings.architecture == "jumprelu" else None
        self._decode(centred, limit)
        fvu = float(self._losses.mean(dtype=np.float64)) / self.d_in  # of a mean square of 1
        if not np.isfinite(fvu):
            raise ModelError(
                "the training diverged: its loss is not finite; lower the learning rate, and "
                "look for activations that are not finite"
            )
        self._measure_gradients(centred, near)
        n_dead = self._revive(centred)
        rate = self.settings.rate_at(self.n_done, self.n_steps)
        self._update(rate)
        return Metrics(fvu, self._l0, n_dead, rate)

    @property
    def limit(self) -> float:
        """The running mean of a batch's smallest activation: BatchTopK's threshold in use."""
        return self._limit

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that ``restore`` needs, by name."""
        numbers = np.array([self.n_done, self._limit, self._floor], np.float64)
        return {
            **self.parameters,
            **self._moments,
            "idle": self._idle.astype(np.float64),
            "numbers": numbers,
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where ``state`` was taken."""
        for name, value in {**self.parameters, **self._moments}.items():
            value[:] = state[name]
        self._idle[:] = state["idle"].astype(np.int64)
        n_done, self._limit, floor = state["numbers"].tolist()
        self.n_done, self._floor = int(n_done), np.float32(floor)

    def close(self) -> None:
        self._workers.close()

    # -- which features are active

    def _find(self, centred: Floats) -> np.float32:
        """The batch's pairs, with their exact activations. Of these, only those that are not
        below what is returned are active."""
        W_enc, b_enc, n = self.parameters["W_enc"], self.parameters["b_enc"], len(centred)
        self._workers.run(lambda *part: self._rough.narrow(W_enc, *part), len(W_enc))
        if self.settings.architecture == "topk":
            self._find_by_token(centred)
        elif self.settings.architecture == "jumprelu":
            lowest = self.parameters["threshold"] - np.float32(self.settings.bandwidth / 2)
            lifts = b_enc - np.maximum(lowest * _ROUGHLY, 0)
            self._workers.run(partial(self._find_over, centred, lifts), n, _CHUNKS_OF_PRODUCT)
        else:
            return self._find_by_batch(centred)
        return np.float32(0.0)

    def _find_over(self, centred: Floats, lifts: Floats, first: int, last: int) -> None:
        pairs, rough = self._pairs, self._rough
        rough.fill(centred, first, last)
        arguments = (rough.sums, rough.row_scales, rough.own_scales, lifts)
        kernels.find_over(*arguments, pairs.cols, pairs.counts, first, last)
        self._weigh(centred, first, last)

    def _weigh(self, centred: Floats, first: int, last: int) -> None:
        """The exact activations of what was found."""
        pairs, W_enc, b_enc = self._pairs, self.parameters["W_enc"], self.parameters["b_enc"]
        found = (pairs.cols, pairs.counts, pairs.values)
        kernels.exact(centred, W_enc, b_enc, *found, first, last)

    def _find_by_token(self, centred: Floats) -> None:
        pairs, rough, k, n = self._pairs, self._rough, self.settings.k, len(centred)
        b_enc, least = self.parameters["b_enc"], int(_SPARE * k)
        # What a row's last active feature has grows with the row: the guess is a share of it.
        norms, floors = np.empty((2, n), np.float32)

        def find(first: int, last: int) -> None:
            rough.fill(centred, first, last)
            norms[first:last] = np.linalg.norm(centred[first:last], axis=1)
            floors[first:last] = norms[first:last] * self._floor
            arguments = (rough.sums, rough.row_scales, rough.own_scales, b_enc, least)
            kernels.find_most(*arguments, floors, pairs.cols, pairs.counts, first, last)
            self._weigh(centred, first, last)
            kernels.keep_largest(k, pairs.cols, pairs.values, pairs.counts, first, last)

        self._workers.run(find, n, _CHUNKS_OF_PRODUCT)
        full = (pairs.counts[:n] == k) & (norms > 0)
        if full.any():
            smallest = pairs.values[:n, :k][full].min(axis=1) / norms[full]
            self._floor = np.float32(np.percentile(smallest, 15)) * _BELOW

    def _find_by_batch(self, centred: Floats) -> np.float32:
        pairs, n = self._pairs, len(centred)
        wanted = self.settings.k * n
        while True:
            lifts = self.parameters["b_enc"] - self._floor
            self._workers.run(partial(self._find_over, centred, lifts), n, _CHUNKS_OF_PRODUCT)
            if pairs.counts[:n].sum() >= _SPARE * wanted or self._floor == 0:
                break
            self._floor = self._floor * _BELOW if self._floor > 1e-4 else np.float32(0.0)
        limit = self._largest(wanted, n)
        self._floor = self._largest(int(_SPARE * wanted), n) * _BELOW
        smallest = float(limit)
        self._limit = smallest if self.n_done == 0 else 0.99 * self._limit + 0.01 * smallest
        return limit

    def _largest(self, wanted: int, n: int) -> np.float32:
        """Of the pairs in the batch's ``n`` rows, how active the last of so many is; the least
        number over 0 where there are fewer."""
        bits, counts, upper = self._pairs.values.view(np.uint32), self._pairs.counts[:n], -1
        for _ in range(2):
            bins = np.zeros(1 << 15, np.int64)
            kernels.histogram(bits, counts, upper, bins)
            larger = np.cumsum(bins[::-1])[::-1]  # pairs with this code or more
            code = max(int(np.searchsorted(-larger, -wanted, side="right")) - 1, 0)
            if upper >= 0:
                break
            wanted -= int(larger[code + 1]) if code + 1 < len(larger) else 0
            upper = code
        limit = np.array([max(upper << 16 | code << 1, 1)], np.uint32)
        return np.float32(limit.view(np.float32)[0])

    def _gate(self) -> NDArray[np.bool_]:
        """Set to 0 what is not over its feature's threshold; which pairs lie near theirs."""
        pairs = self._pairs
        used = pairs.used
        cols = pairs.cols[:, : used.shape[1]]
        values = pairs.values[:, : used.shape[1]]
        thresholds = self.parameters["threshold"][np.where(used, cols, 0)]
        near: NDArray[np.bool_] = used & (np.abs(values - thresholds) < self.settings.bandwidth / 2)
        values[used & (values <= thresholds)] = 0
        return near

    # -- learning

    def _decode(self, centred: Floats, limit: np.float32) -> None:
        """The reconstructions' errors, and what each pair that stays does to the loss."""
        pairs, W_dec = self._pairs, self.parameters["W_dec"]

        def decode(first: int, last: int) -> None:
            if limit > 0:
                kernels.keep_from(limit, pairs.cols, pairs.values, pairs.counts, first, last)
            found = (pairs.cols, pairs.counts, pairs.values)
            made = (self._errors, pairs.slopes, self._losses)
            kernels.decode(centred, W_dec, self._ends, *found, *made, first, last)

        self._workers.run(decode, len(centred))

    def _measure_gradients(self, centred: Floats, near: NDArray[np.bool_] | None) -> None:
        pairs, gradients, d_sae = self._pairs, self._gradients, self.settings.d_sae
        starts = np.zeros(d_sae + 2, np.int64)
        n_pairs = int(pairs.counts.sum())
        rows, places = np.empty(n_pairs, np.int32), np.empty(n_pairs, np.int32)
        kernels.by_feature(pairs.cols, pairs.counts, starts, rows, places)
        scale = np.float32(2 / (len(centred) * self.d_in))
        inputs = (centred, self._errors, self._ends, pairs.values, pairs.slopes)
        by_feature = (starts, rows, places, scale)
        made = (gradients["W_enc"], gradients["W_dec"], gradients["b_enc"], self._hits)
        self._workers.run(
            lambda *part: kernels.gradients(*inputs, *by_feature, *made, *part), d_sae
        )
        errors = self._errors[: len(centred), 0]
        gradients["b_dec"][:] = errors.sum(axis=0) * scale
        gradients["b_dec"] -= gradients["b_enc"] @ self.parameters["W_enc"]
        gradients["threshold"][:] = 0
        if near is not None:
            self._threshold_gradient(near, scale)
        self._l0 = float(self._hits.sum()) / len(centred)
        self._idle += len(centred)
        self._idle[self._hits > 0] = 0

    def _threshold_gradient(self, near: NDArray[np.bool_], scale: np.float32) -> None:
        """Straight through a rectangle of ``bandwidth`` (arXiv 2407.14435, eqs. 11 and 12)."""
        pairs, settings, d_sae = self._pairs, self.settings, self.settings.d_sae
        width = near.shape[1]
        cols = pairs.cols[:, :width][near]
        slopes = pairs.slopes[:, :width][near].astype(np.float64) * scale
        thresholds = self.parameters["threshold"].astype(np.float64)
        by_loss = np.bincount(cols, slopes, d_sae) * thresholds
        excess = 2 * settings.sparsity * (self._l0_now() / settings.k - 1) / settings.k
        by_count = np.bincount(cols, minlength=d_sae) * (excess / len(near))
        gradient = -(by_loss + by_count) / settings.bandwidth
        self._gradients["threshold"][:] = gradient

    def _l0_now(self) -> float:
        used = self._pairs.used
        return float((self._pairs.values[:, : used.shape[1]][used] > 0).sum()) / len(used)

    def _revive(self, centred: Floats) -> int:
        """The auxiliary loss: dead features learn what the others leave over."""
        dead = np.flatnonzero(self._idle > self.settings.dead_after)
        n_dead = len(dead)
        if not n_dead or not self.settings.auxiliary:
            return n_dead
        if n_dead > _MAX_DEAD_AT_ONCE:
            random = np.random.default_rng((self.settings.seed, self.n_done))
            dead = np.sort(random.choice(dead, _MAX_DEAD_AT_ONCE, replace=False))
        rest = -self._errors[: len(centred), -1] * len(self._ends)
        W_enc, W_dec = self.parameters["W_enc"][dead], self.parameters["W_dec"][dead]
        acts = np.maximum(centred @ W_enc.T + self.parameters["b_enc"][dead], 0)
        k = min(self.d_in // 2, len(dead))
        if k < len(dead):
            limit = np.partition(acts, len(dead) - k, axis=1)[:, len(dead) - k]
            acts[acts < limit[:, None]] = 0
        error = acts @ W_dec - rest
        share = self.settings.auxiliary * min(1.0, n_dead / k)
        weight = np.float32(2 * share / max(float(np.square(rest).sum()), 1e-12))
        slopes = (error @ W_dec.T) * (acts > 0)
        self._gradients["W_dec"][dead] += weight * (acts.T @ error)
        self._gradients["W_enc"][dead] += weight * (slopes.T @ centred)
        self._gradients["b_enc"][dead] += weight * slopes.sum(axis=0)
        return n_dead

    def _update(self, rate: float) -> None:
        parameters, gradients, moments = self.parameters, self._gradients, self._moments
        slopes, squares = (gradients["W_enc"], gradients["W_dec"]), self._squares
        d_sae, W_dec = self.settings.d_sae, parameters["W_dec"]
        self._workers.run(lambda *part: kernels.settle(W_dec, *slopes, squares, *part), d_sae)
        if self._reduce is not None:
            self._reduce(list(gradients.values()))
            squares = np.array([float(np.vdot(slope, slope)) for slope in slopes])
        self.n_done += 1
        total = float(squares.sum(dtype=np.float64))
        total += sum(float(np.vdot(gradients[name], gradients[name])) for name in _VECTORS)
        shrink = np.float32(min(1.0, self.settings.clip / max(total**0.5, 1e-12)))
        corrections = (1 - _BETAS.astype(np.float64) ** self.n_done).astype(np.float32)

        def adam(name: str, first: int, last: int) -> None:
            moved = (moments[f"mean.{name}"], moments[f"square.{name}"])
            arrays = (parameters[name], gradients[name], *moved)
            rows = [array[None] if array.ndim == 1 else array for array in arrays]
            numbers = (np.float32(rate), shrink, _BETAS, corrections, name == "W_dec")
            step: Any = kernels.adam
            step(*rows, *numbers, first, last)

        def adam_on_features(first: int, last: int) -> None:
            for name in _MATRICES:
                adam(name, first, last)

        self._workers.run(adam_on_features, d_sae)
        for name in _VECTORS:
            adam(name, 0, 1)
        np.maximum(self.parameters["threshold"], 1e-3, out=self.parameters["threshold"])


def geometric_median(x: Floats, n_iterations: int = 30) -> Floats:
    """The point whose summed distance to the rows of ``x`` is least (Weiszfeld's iteration)."""
    median = x.mean(axis=0, dtype=np.float64)
    for _ in range(n_iterations):
        weights = 1 / np.maximum(np.linalg.norm(x - median, axis=1), 1e-6)
        median = (x * weights[:, None]).sum(axis=0) / weights.sum()
    return np.asarray(median, np.float32)
