"""A training run on disk: where it stands, so that it goes on after it was stopped.

folder/
  run.json                settings, layer, harvest, scaling
  checkpoint.safetensors  the trainer's state; replaced whole, never half-written
  metrics.jsonl           a line now and then
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from fortpoint.errors import ModelError, StorageError
from fortpoint.features.activations import Plan
from fortpoint.features.training.settings import Settings
from fortpoint.vault import tensor_file, tensor_writer

RUN = "run.json"
CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is trained on what; ``n_held_out`` shards are never learned from."""

    settings: Settings
    layer: int
    harvest: Plan
    n_held_out: int
    n_steps: int
    n_ranks: int = 1


class Measured(msgspec.Struct, frozen=True):
    """One line of ``metrics.jsonl``: means since the line before, and seconds so far."""

    step: int
    tokens: int
    seconds: float
    fvu: float
    l0: float
    n_dead: int
    rate: float
    tokens_per_s: float


def begin(folder: Path, run: Run) -> None:
    """Make the folder or go on with it. Raises ``ModelError`` when another run lies there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (folder / RUN).exists():
            if _read_run(folder) != run:
                raise ModelError(
                    f"{folder} holds another run (other settings, layer or harvest); choose "
                    "another folder or delete it"
                )
            return
        write_whole(folder / RUN, msgspec.json.format(msgspec.json.encode(run), indent=2))
    except OSError as error:
        raise _storage(folder, error) from None


def save_state(folder: Path, state: Mapping[str, NDArray[Any]]) -> None:
    """Replace the checkpoint. Raises ``StorageError``; then the one before is still there."""
    tensor_writer.write(folder / CHECKPOINT, state)


def load_state(folder: Path, like: Mapping[str, NDArray[Any]]) -> dict[str, Any] | None:
    """The checkpoint's arrays, each shaped like ``like``'s; None where there is none yet."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    return dict(tensor_file.read(path, {name: value.shape for name, value in like.items()}))


def add_metrics(folder: Path, measured: Measured) -> None:
    try:
        with (folder / METRICS).open("ab") as file:
            file.write(msgspec.json.encode(measured) + b"\n")
    except OSError as error:
        raise _storage(folder, error) from None


def keep_metrics_until(folder: Path, step: int) -> None:
    """Drop lines of steps after the checkpoint that the run goes on from."""
    kept = [one for one in read_metrics(folder) if one.step <= step]
    content = b"".join(msgspec.json.encode(one) + b"\n" for one in kept)
    try:
        write_whole(folder / METRICS, content)
    except OSError as error:
        raise _storage(folder, error) from None


def read_metrics(folder: Path) -> Iterator[Measured]:
    path = folder / METRICS
    if path.exists():
        decoder = msgspec.json.Decoder(Measured)
        for line in path.read_bytes().splitlines():
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError:  # the end of a line may be missing after a crash
                return


def write_whole(path: Path, content: bytes) -> None:
    """Raises ``OSError``; then nothing of it is left."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read_run(folder: Path) -> Run:
    try:
        return msgspec.json.decode((folder / RUN).read_bytes(), type=Run)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ModelError(f"{folder / RUN} is damaged; delete the folder and train again") from None


def _storage(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write to {folder}: {error.strerror or error}; what was saved before is kept, and "
        "the same command goes on from there"
    )
