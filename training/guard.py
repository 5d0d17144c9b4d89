"""Trains the guard and writes what ships: one command, from data to card.

    python -m training.guard --data ../shared/data --model ~/.fortpoint/models/smollm2-135m

Reading the model takes long (see ``training.harvest``); the cache keeps what was read, and the
same cache gives the same artefacts. ``--no-harvest`` trains on what the cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from fortpoint.guard.calibration import Calibration, Calibrations
from fortpoint.guard.detector import tail_probe
from fortpoint.guard.guard import ARTEFACTS
from training import card, probes, text
from training.calibrate import Evidence, calibrate
from training.harvest import LAYERS, Activations, Cache, harvest
from training.measure import Scored
from training.rows import DETECTORS, Row, select

MODEL = "smollm2-135m"


@dataclass(frozen=True)
class _Subset:
    """The rows that were read, and where they are among the text model's rows."""

    rows: list[Row]
    at: list[int]
    tokens: probes.Readings
    tail: probes.Readings


def main() -> None:
    arguments = _arguments()
    cache = Cache(arguments.cache.expanduser())
    rows = select(arguments.data)
    if not arguments.no_harvest:
        harvest([row for row in rows if row.read], cache, arguments.model.expanduser())
    # One thread: sums in another order would give other last digits, and other artefacts.
    with threadpool_limits(1):
        train(text.choose(rows), cache.load(), arguments.out)


def train(rows: list[Row], read: Mapping[str, Activations], out: Path) -> None:
    """Fit, calibrate, measure, write."""
    subset = _subset(rows, read)
    print(f"{len(rows)} texts, {len(subset.rows)} of them read inside the model", flush=True)
    texts = text.vectorise(rows)
    evidence = {name: _evidence(rows, texts, subset, name) for name in DETECTORS}
    calibrations = {name: calibrate(rows, name, evidence[name]) for name in DETECTORS}
    _write_text_model(rows, texts, out / "text_model.safetensors")
    _write_probes(subset, out)
    _write_json(Calibrations(calibrations), out / "calibration.json")
    (out / "CARD.md").write_text(
        _card(rows, subset, evidence, calibrations, read), encoding="utf-8"
    )


def _subset(rows: list[Row], read: Mapping[str, Activations]) -> _Subset:
    at = [index for index, row in enumerate(rows) if row.key in read]
    chosen = [rows[index] for index in at]
    return _Subset(chosen, at, probes.of_tokens(chosen, read), probes.of_tail(chosen, read))


def _evidence(rows: list[Row], texts: text.Texts, subset: _Subset, name: str) -> Evidence:
    """Cross-fitted logits of one detector."""
    tokens, tail = np.full((2, len(rows)), np.nan)
    tokens[subset.at] = probes.cross_fitted(subset.rows, subset.tokens, name)
    tail[subset.at] = probes.cross_fitted(subset.rows, subset.tail, name)
    words = text.cross_fitted(rows, texts, name)
    print(f"cross-fitted {name}", flush=True)
    return Evidence(words, tokens, tail)


def _write_text_model(rows: list[Row], texts: text.Texts, file: Path) -> None:
    table, bias = text.table(rows, texts)
    save_file({"table": table, "bias": bias}, file, {"detectors": ",".join(DETECTORS)})


def _write_probes(subset: _Subset, out: Path) -> None:
    """In the form that the engine reads: see ``fortpoint.engine.linear_probe``."""
    side = np.array([row.train for row in subset.rows])
    fitted = {
        **{n: probes.train(subset.rows, subset.tokens, n, side) for n in DETECTORS},
        **{tail_probe(n): probes.train(subset.rows, subset.tail, n, side) for n in DETECTORS},
    }
    weights = np.stack([probe.W for probe in fitted.values()], axis=1)
    bias = np.array([probe.b for probe in fitted.values()], dtype=np.float32)
    save_file({"W": np.ascontiguousarray(weights), "b": bias}, out / "probes.safetensors")
    about = {
        "model": MODEL,
        "hook": "resid_post",
        "normalise": "rms",
        "probes": list(fitted),
        "layers": list(LAYERS),
    }
    _write_json(about, out / "probes.json")


def _write_json(value: object, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _card(
    rows: list[Row],
    subset: _Subset,
    evidence: Mapping[str, Evidence],
    calibrations: Mapping[str, Calibration],
    activations: Mapping[str, Activations],
) -> str:
    of_read = {name: _taken(one, subset.at) for name, one in evidence.items()}
    read = {"tail": Scored.of(subset.rows, of_read, calibrations, "tail")}
    words = {"text": Scored.of(subset.rows, of_read, calibrations, "text")}
    used = {row.key for row in subset.rows}
    trained = [row if row.key in used else _unread(row) for row in rows]
    n_tokens = [activations[row.key].n_tokens for row in subset.rows]
    return card.write(trained, read, words, calibrations, n_tokens)


def _taken(evidence: Evidence, at: Sequence[int]) -> Evidence:
    return Evidence(evidence.text[at], evidence.probes[at], evidence.tail[at])


def _unread(row: Row) -> Row:
    return replace(row, read=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the guard's shipped artefacts.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=Path("~/.fortpoint/models/smollm2-135m"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fortpoint-training"))
    parser.add_argument("--out", type=Path, default=ARTEFACTS)
    parser.add_argument("--no-harvest", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
