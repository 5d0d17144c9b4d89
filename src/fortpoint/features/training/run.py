"""A whole training run: batches to the trainer, metrics to disk, a checkpoint now and then.

    run = plan_run(store, layer=15, settings=settings, n_held_out=2)
    trainer, scaling = train(folder, run, store, progress=print_progress)

With ``torchrun --nproc-per-node 2 -m fortpoint ... features train`` each process learns from
its own share of the shards, and gradients are averaged over all of them (gloo).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fortpoint.features.activations import ActivationStore
from fortpoint.features.training import checkpoint
from fortpoint.features.training.batches import Batches, Scaling, measure_scaling
from fortpoint.features.training.checkpoint import Measured, Run
from fortpoint.features.training.settings import Settings
from fortpoint.features.training.trainer import Floats, Metrics, Reduce, Trainer

REPORT_STEPS = 50
CHECKPOINT_S = 60.0


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, /, note: str = "") -> None: ...


@dataclass
class Group:
    """The processes that train together: this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1
    reduce: Reduce | None = field(default=None, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.size > 1:
            from torch import distributed

            distributed.barrier()


@contextmanager
def processes() -> Iterator[Group]:
    """Join the group that torch's launcher set up in the environment; alone without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    size = distributed.get_world_size()

    def reduce(arrays: Sequence[Floats]) -> None:
        for array in arrays:
            tensor = torch.from_numpy(array)
            distributed.all_reduce(tensor)
            tensor /= size

    try:
        yield Group(distributed.get_rank(), size, reduce)
    finally:
        distributed.destroy_process_group()


def own_threads() -> int:
    """This process's share of the machine's cores, among those that torch's launcher started."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    n_processes = int(beside) if beside.isascii() and beside.isdigit() else 1
    return max(1, (os.cpu_count() or 1) // max(1, n_processes))


def plan_run(
    store: ActivationStore, layer: int, settings: Settings, n_held_out: int, n_ranks: int = 1
) -> Run:
    """How long the run will be. Raises ``ModelError``, ``InvalidRequest``."""
    settings.check()
    store.check_layer(layer)
    shards, _ = store.split(n_held_out)
    nothing = Scaling(np.zeros(store.plan.d_model, np.float32), 1.0)
    per_epoch = min(
        Batches(
            store, layer, shards, settings.batch, nothing, settings.seed, rank, n_ranks
        ).per_epoch
        for rank in range(n_ranks)
    )
    n_steps = max(1, round(settings.epochs * per_epoch))
    return Run(settings, layer, store.plan, n_held_out, n_steps, n_ranks)


def train(
    folder: Path,
    run: Run,
    store: ActivationStore,
    progress: Progress,
    group: Group | None = None,
) -> tuple[Trainer, Scaling]:
    """Until the run's last step, from where its checkpoint stands.

    Raises ``ModelError`` when the loss is not finite, ``StorageError`` when the disk is full;
    the last checkpoint is whole in both cases.
    """
    group = group or Group()
    settings = run.settings
    shards, _ = store.split(run.n_held_out)
    scaling = measure_scaling(store, run.layer, shards)
    batches = Batches(
        store,
        run.layer,
        shards,
        settings.batch,
        scaling,
        settings.seed,
        group.rank,
        group.size,
    )
    trainer = Trainer(settings, store.plan.d_model, run.n_steps, group.reduce, own_threads())
    _restore(folder, run, trainer, batches, group)
    meter = _Meter(folder if group.leads else None, trainer, group.size)
    last_saved = time.monotonic()
    for x in batches.since(trainer.n_done):
        if trainer.n_done >= run.n_steps:
            break
        meter.add(trainer.step(x))
        if group.leads:
            progress("train", trainer.n_done, run.n_steps, note=meter.note)
        if group.leads and time.monotonic() - last_saved > CHECKPOINT_S:
            checkpoint.save_state(folder, trainer.state())
            last_saved = time.monotonic()
    if group.leads:
        checkpoint.save_state(folder, trainer.state())
    group.wait()
    return trainer, scaling


def _restore(folder: Path, run: Run, trainer: Trainer, batches: Batches, group: Group) -> None:
    if group.leads:
        checkpoint.begin(folder, run)
    group.wait()
    state = checkpoint.load_state(folder, trainer.state())
    if state is None:
        trainer.begin(batches.sample())
    else:
        trainer.restore(state)
        if group.leads:
            checkpoint.keep_metrics_until(folder, trainer.n_done)
    group.wait()


class _Meter:
    """Means over ``REPORT_STEPS`` steps, to ``metrics.jsonl``."""

    def __init__(self, folder: Path | None, trainer: Trainer, n_ranks: int) -> None:
        self._folder, self._trainer = folder, trainer
        self._tokens = trainer.settings.batch * n_ranks
        self._rows: list[Metrics] = []
        self._before = list(checkpoint.read_metrics(folder))[-1:] if folder else []
        self._seconds = self._before[0].seconds if self._before else 0.0
        self._started = time.monotonic()
        self.note = ""

    def add(self, metrics: Metrics) -> None:
        self._rows.append(metrics)
        if len(self._rows) < REPORT_STEPS or self._folder is None:
            return
        took = time.monotonic() - self._started
        self._seconds += took
        measured = Measured(
            step=self._trainer.n_done,
            tokens=self._trainer.n_done * self._tokens,
            seconds=round(self._seconds, 3),
            fvu=_mean(self._rows, "fvu"),
            l0=_mean(self._rows, "l0"),
            n_dead=metrics.n_dead,
            rate=metrics.rate,
            tokens_per_s=round(len(self._rows) * self._tokens / took, 1),
        )
        checkpoint.add_metrics(self._folder, measured)
        self.note = (
            f"EV {1 - measured.fvu:.4f}  L0 {measured.l0:.1f}  dead {measured.n_dead}  "
            f"{measured.tokens_per_s:,.0f} tokens/s"
        )
        self._rows, self._started = [], time.monotonic()


def _mean(rows: Sequence[Metrics], name: str) -> float:
    return round(float(np.mean([getattr(row, name) for row in rows])), 6)
