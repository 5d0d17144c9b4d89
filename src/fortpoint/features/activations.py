"""Harvested activations on disk: shards of tokens, each with its place, role and vectors.

    folder/
      harvest.json          what was harvested: model, digest, layers, context, seed, corpus
      shard-00000/          tokens.npy document.npy position.npy (int32 [n]), role.npy (uint8 [n])
                            layer-15.npy (uint16 [n, d_model]: bfloat16), norm-15.npy (float32 [n])

A shard appears whole or not at all. Documents are in random order, so a shard is a sample of
all text. Every token is kept here; those that no dictionary should learn from (attention sinks:
the first of a text, and norms over ten times the median) are left out by ``kept``.

Raw activations say what a text was: they are the operator's, like the weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError, NotFound, StorageError

PLAN = "harvest.json"
SINK_NORM = 10.0
"""In medians: a token whose norm is beyond is a sink."""

_SHARD = re.compile(r"shard-(\d{5})")
_PLACES = {"tokens": np.int32, "document": np.int32, "position": np.int32, "role": np.uint8}

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a harvest is made of; one that differs in anything is another harvest.

    ``corpus`` is the SHA-256 of all windows' tokens; ``shard_tokens`` bounds a shard.
    """

    model: str
    digest: str
    d_model: int
    layers: tuple[int, ...]
    context: int
    seed: int
    n_tokens: int
    shard_tokens: int
    corpus: str


@dataclass(frozen=True, eq=False)
class Shard:
    """One folder of the store; arrays are mapped from disk as they are touched."""

    path: Path

    def _array(self, name: str) -> NDArray[np.generic]:
        try:
            array: NDArray[np.generic] = np.load(
                self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False
            )
        except (OSError, ValueError):
            raise ModelError(
                f"{self.path.name}/{name}.npy cannot be read; delete {self.path.name} and "
                "harvest again, which goes on where it is missing"
            ) from None
        return array

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        return self._array("tokens")  # type: ignore[return-value]

    @cached_property
    def document(self) -> NDArray[np.int32]:
        return self._array("document")  # type: ignore[return-value]

    @cached_property
    def position(self) -> NDArray[np.int32]:
        return self._array("position")  # type: ignore[return-value]

    @cached_property
    def role(self) -> NDArray[np.uint8]:
        return self._array("role")  # type: ignore[return-value]

    def norm(self, layer: int) -> Floats:
        return self._array(f"norm-{layer}")  # type: ignore[return-value]

    def bits(self, layer: int) -> Bits:
        """bfloat16 ``[n, d_model]``, as unsigned integers."""
        return self._array(f"layer-{layer}")  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.tokens)


class ActivationStore:
    """The shards of one harvest, complete or still growing."""

    def __init__(self, folder: Path) -> None:
        """Raises ``NotFound`` where no harvest is, ``ModelError`` where it is damaged."""
        self.folder = folder
        self.plan = _read_plan(folder)
        numbers = sorted(
            int(found[1]) for path in folder.iterdir() if (found := _SHARD.fullmatch(path.name))
        )
        if numbers != list(range(len(numbers))):
            raise ModelError(f"{folder.name} lacks a shard in its middle; harvest again to mend it")
        self.shards = [Shard(shard_path(folder, number)) for number in numbers]
        self._medians: dict[int, float] = {}

    @property
    def n_tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def check_layer(self, layer: int) -> None:
        """Raises ``ModelError`` for a layer that was not harvested."""
        if layer not in self.plan.layers:
            known = ", ".join(map(str, self.plan.layers))
            raise ModelError(f"layer {layer} was not harvested; here: {known}")

    def kept(self, shard: Shard, layer: int) -> NDArray[np.int64]:
        """The rows of ``shard`` that are no sinks, ascending."""
        norms = shard.norm(layer)
        sound = (shard.position > 0) & (norms <= SINK_NORM * self.median_norm(layer))
        return np.flatnonzero(sound)

    def median_norm(self, layer: int) -> float:
        """Of the first shard's tokens that begin no text."""
        if layer not in self._medians:
            shard = self.shards[0]
            self._medians[layer] = float(np.median(shard.norm(layer)[shard.position > 0]))
        return self._medians[layer]

    def split(self, n_held_out: int) -> tuple[list[Shard], list[Shard]]:
        """Shards to learn from, and the last ``n_held_out`` to measure on.

        Raises ``ModelError`` when nothing is left to learn from. One document may reach from
        the one into the other.
        """
        if n_held_out >= len(self.shards):
            raise ModelError(
                f"{self.folder.name} has {len(self.shards)} shards, {n_held_out} of them to "
                "measure on: harvest more text"
            )
        at = len(self.shards) - n_held_out
        return self.shards[:at], self.shards[at:]


def widen(bits: Bits) -> Floats:
    """bfloat16 to float32."""
    wide = np.asarray(bits).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def narrow(x: Floats) -> Bits:
    """float32 to bfloat16, to the nearest and to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


def begin(folder: Path, plan: Plan) -> int:
    """Make the folder, or go on with it; returns how many shards it has already.

    Raises ``ModelError`` when another harvest lies there, ``StorageError`` when it cannot be
    written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if (folder / PLAN).exists():
            if _read_plan(folder) != plan:
                raise ModelError(
                    f"{folder} holds a harvest of another model, corpus or setting; choose "
                    "another folder or delete it"
                )
        else:
            _write(folder / PLAN, msgspec.json.format(msgspec.json.encode(plan), indent=2))
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from None
    number = 0
    while shard_path(folder, number).is_dir():
        number += 1
    return number


def write_shard(
    folder: Path,
    number: int,
    places: Mapping[str, NDArray[np.generic]],
    residual: Mapping[int, Floats],
) -> None:
    """Put one shard where the store finds it. Raises ``StorageError``; then nothing is left."""
    partial = folder / f"shard-{number:05d}.partial"
    try:
        partial.mkdir(mode=0o700)
        for name, kind in _PLACES.items():
            np.save(partial / f"{name}.npy", places[name].astype(kind), allow_pickle=False)
        for layer, x in residual.items():
            np.save(partial / f"layer-{layer}.npy", narrow(x), allow_pickle=False)
            norms = np.linalg.norm(x, axis=1).astype(np.float32)
            np.save(partial / f"norm-{layer}.npy", norms, allow_pickle=False)
        partial.rename(shard_path(folder, number))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"cannot write shard {number} to {folder}: {error.strerror or error}; what was "
            "harvested is kept, and the same command goes on from there"
        ) from None


def windows_of(shard: Shard) -> Iterator[slice]:
    """The rows of each window of text: a window begins where the position is 0."""
    starts = np.flatnonzero(shard.position == 0)
    ends = np.append(starts[1:], len(shard))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield slice(start, end)


def _read_plan(folder: Path) -> Plan:
    try:
        return msgspec.json.decode((folder / PLAN).read_bytes(), type=Plan)
    except FileNotFoundError:
        raise NotFound(
            f"no harvest in {folder}; make one with `fortpoint features harvest`"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        raise ModelError(
            f"{folder / PLAN} is damaged; delete the folder and harvest again"
        ) from None


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
