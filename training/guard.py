"""Trains the guard and writes what ships: one command, from data to card.

    python -m training.guard --data ../shared/data --model ~/.fortpoint/models/smollm2-135m

Reading the model takes long (see ``training.harvest``); the cache keeps what was read, and the
same cache gives the same artefacts. ``--no-harvest`` trains on what the cache holds. The fitting
itself is ``fortpoint.guard.training``, as for an operator's own examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from fortpoint.guard.calibration import Calibration, Calibrations
from fortpoint.guard.guard import ARTEFACTS
from fortpoint.guard.training import probes, text_table
from fortpoint.guard.training.examples import DETECTORS, Example
from fortpoint.guard.training.figures import Scored
from fortpoint.guard.training.folds import Folds
from fortpoint.guard.training.joining import Evidence, calibrate
from fortpoint.guard.training.run import Origin, fitted_probes, probe_files, table_file
from fortpoint.vault.model_folder import open_model
from training import card, folds
from training.groups import BUDGETS
from training.harvest import LAYERS, Cache, harvest
from training.rows import Row, choose, select

EVIDENCE = "evidence.npz.kept"  # beside the shards, which end in .npz


@dataclass(frozen=True)
class Read:
    """The rows that were read inside the model, and where they are among the text model's."""

    at: list[int]
    examples: list[Example]
    n_tokens: list[int]
    tokens: probes.Readings
    tail: probes.Readings
    parts: Folds


@dataclass(frozen=True)
class Fitted:
    """Detectors, and what models that never saw a row's family gave it."""

    rows: list[Row]
    examples: list[Example]
    texts: text_table.Texts
    read: Read
    calibrations: dict[str, Calibration]
    evidence: dict[str, Evidence]

    def scored(self, mode: str) -> Scored:
        """The rows that were read, with their readings (``tail``) or without (``text``)."""
        of_read = {name: one.taken(self.read.at) for name, one in self.evidence.items()}
        return Scored.of(self.read.examples, of_read, self.calibrations, mode)


def main() -> None:
    arguments = _arguments()
    cache = Cache(arguments.cache.expanduser())
    rows = select(arguments.data)
    model = arguments.model.expanduser()
    if not arguments.no_harvest:
        harvest([row for row in rows if row.read], cache, model)
    manifest = open_model(model).manifest
    # One thread: sums in another order would give other last digits, and other artefacts.
    with threadpool_limits(1):
        fitted = fit(choose(rows), cache.load())
        write(fitted, Origin(manifest.name, manifest.digest, LAYERS), arguments.out)
        keep(fitted, arguments.cache.expanduser() / EVIDENCE)


def fit(rows: list[Row], found: Mapping[str, probes.Activations]) -> Fitted:
    """Cross-fitted evidence, how it is joined, and the thresholds."""
    examples = [row.example for row in rows]
    read = _read(rows, examples, found)
    print(f"{len(rows)} texts, {len(read.at)} of them read inside the model", flush=True)
    texts = text_table.vectorise(examples)
    parts = folds.plan(examples)
    evidence = {name: _evidence(examples, texts, parts, read, name) for name in DETECTORS}
    calibrations = {n: calibrate(examples, n, one, BUDGETS) for n, one in evidence.items()}
    return Fitted(rows, examples, texts, read, calibrations, evidence)


def keep(fitted: Fitted, file: Path) -> None:
    """What was cross-fitted, for ``benchmarks/guard_quality.py``: [n_rows, 3] a detector."""
    columns = {name: one.columns("tail") for name, one in fitted.evidence.items()}
    with file.open("wb") as target:
        np.savez(target, keys=np.array([row.key for row in fitted.rows]), **columns)


def write(fitted: Fitted, origin: Origin, out: Path) -> None:
    """The artefacts and their card."""
    read = fitted.read
    table = text_table.table(fitted.examples, fitted.texts, DETECTORS)
    probe = fitted_probes(read.examples, read.tokens, read.tail, DETECTORS)
    joined = msgspec.json.encode(Calibrations(fitted.calibrations))
    keys = {fitted.rows[at].key for at in read.at}
    made = card.Made(
        fitted.rows, keys, fitted.scored("tail"), fitted.scored("text"), fitted.calibrations
    )
    files = {
        "text_model.safetensors": table_file(table, DETECTORS),
        "calibration.json": msgspec.json.format(joined, indent=2) + b"\n",
        "CARD.md": card.write(made, read.n_tokens).encode(),
        **probe_files(probe, origin),
    }
    for name, content in files.items():
        (out / name).write_bytes(content)


def _read(
    rows: list[Row], examples: list[Example], found: Mapping[str, probes.Activations]
) -> Read:
    at = [index for index, row in enumerate(rows) if row.key in found]
    activations = [found[rows[index].key] for index in at]
    chosen = [examples[index] for index in at]
    return Read(
        at,
        chosen,
        [one.n_tokens for one in activations],
        probes.of_tokens(activations),
        probes.of_tail(activations),
        folds.plan(chosen),
    )


def _evidence(
    examples: list[Example], texts: text_table.Texts, parts: Folds, read: Read, name: str
) -> Evidence:
    """Cross-fitted logits of one detector."""
    tokens, tail = np.full((2, len(examples)), np.nan)
    tokens[read.at] = probes.cross_fitted(read.examples, read.tokens, name, read.parts)
    tail[read.at] = probes.cross_fitted(read.examples, read.tail, name, read.parts)
    words = text_table.cross_fitted(examples, texts, name, parts)
    print(f"cross-fitted {name}", flush=True)
    return Evidence(words, tokens, tail)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the guard's shipped artefacts.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=Path("~/.fortpoint/models/smollm2-135m"))
    parser.add_argument("--cache", type=Path, default=Path(".bench/guard/readings"))
    parser.add_argument("--out", type=Path, default=ARTEFACTS)
    parser.add_argument("--no-harvest", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
