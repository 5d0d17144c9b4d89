"""Trains detectors on an operator's examples and writes the folder that the guard loads.

    settings = Settings(("jailbreak",), false_positives=0.01)
    trained = train(examples, activations, settings)
    write(trained, folder, origin)

The folder holds ``text_model.safetensors``, ``probes.{json,safetensors}`` (unless text alone was
used), ``calibration.json``, ``answers.json``, ``CARD.md``, and ``scores.jsonl``: what each example
was given by models that never saw its fold, for ``fortpoint guard report``, with its words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from threadpoolctl import threadpool_limits

from fortpoint.errors import StorageError
from fortpoint.guard.answer import AnswerThresholds, Thresholds
from fortpoint.guard.calibration import Calibration, Calibrations
from fortpoint.guard.detector import tail_probe
from fortpoint.guard.training import folds, probes, text_table
from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.figures import Scored
from fortpoint.guard.training.joining import Budget, Evidence, calibrate

EXCERPT_CHARS = 400
_SURE = 0.999
Update = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Origin:
    """The model that was read: its name, its digest, and after which blocks."""

    model: str
    digest: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """``false_positives`` is the share of benign texts that one detector may block."""

    detectors: tuple[str, ...]
    false_positives: float = 0.01

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return (Budget("benign texts", self.false_positives, lambda one: one.benign),)


@dataclass(frozen=True)
class Trained:
    """Everything that is written; ``probes`` is empty where nothing was read inside a model."""

    examples: Sequence[Example]
    settings: Settings
    parts: folds.Folds
    table: text_table.Table
    probes: Mapping[str, probes.Probe]
    calibrations: Mapping[str, Calibration]
    evidence: Mapping[str, Evidence]

    @property
    def mode(self) -> str:
        return "tail" if self.probes else "text"

    def scored(self, mode: str) -> Scored:
        return Scored.of(self.examples, self.evidence, self.calibrations, mode)


class ScoreRow(msgspec.Struct, frozen=True):
    """A line of ``scores.jsonl``: ``scores`` with readings (where there are any), out of fold."""

    text: str
    label: str
    family: str
    scores: dict[str, float]
    text_scores: dict[str, float]
    blocked: bool


class About(msgspec.Struct, frozen=True):
    """The first line of ``scores.jsonl``."""

    model: str
    digest: str
    left_out: str
    false_positives: float
    thresholds: dict[str, float]


def train(
    examples: Sequence[Example],
    activations: Sequence[probes.Activations] | None,
    settings: Settings,
    update: Update,
) -> Trained:
    """Fit, join and choose thresholds. One thread: the same examples give the same detectors."""
    with threadpool_limits(1):
        parts = folds.plan(examples)
        texts = text_table.vectorise(examples)
        readings = None if activations is None else _readings(activations)
        evidence = {}
        for number, name in enumerate(settings.detectors):
            update("train", number, len(settings.detectors))
            evidence[name] = _evidence(examples, texts, readings, name, parts)
        calibrations = {
            name: calibrate(examples, name, one, settings.budgets) for name, one in evidence.items()
        }
        fitted = {}
        if readings is not None:
            both = readings.tokens, readings.tail
            fitted = fitted_probes(examples, *both, settings.detectors)
        table = text_table.table(examples, texts, settings.detectors)
        update("train", len(settings.detectors), len(settings.detectors))
    return Trained(examples, settings, parts, table, fitted, calibrations, evidence)


@dataclass(frozen=True)
class _Read:
    tokens: probes.Readings
    tail: probes.Readings


def _readings(activations: Sequence[probes.Activations]) -> _Read:
    return _Read(probes.of_tokens(activations), probes.of_tail(activations))


def _evidence(
    examples: Sequence[Example],
    texts: text_table.Texts,
    readings: _Read | None,
    name: str,
    parts: folds.Folds,
) -> Evidence:
    words = text_table.cross_fitted(examples, texts, name, parts)
    if readings is None:
        missing = np.full(len(examples), np.nan)
        return Evidence(words, missing, missing)
    tokens = probes.cross_fitted(examples, readings.tokens, name, parts)
    return Evidence(words, tokens, probes.cross_fitted(examples, readings.tail, name, parts))


def fitted_probes(
    examples: Sequence[Example],
    tokens: probes.Readings,
    tail: probes.Readings,
    detectors: Sequence[str],
) -> dict[str, probes.Probe]:
    """From every example that may train."""
    side = np.array([one.trains for one in examples])
    return {
        **{n: probes.train(examples, tokens, n, side) for n in detectors},
        **{tail_probe(n): probes.train(examples, tail, n, side) for n in detectors},
    }


def write(trained: Trained, folder: Path, origin: Origin | None, card: str) -> None:
    """Each file whole or not at all. Raises ``StorageError``."""
    names = trained.settings.detectors
    files = {
        "text_model.safetensors": table_file(trained.table, names),
        "calibration.json": _json(Calibrations(dict(trained.calibrations))),
        "CARD.md": card.encode(),
        "answers.json": _answers(trained.calibrations),
        "scores.jsonl": _scores(trained, origin),
    }
    if origin is not None:
        files |= probe_files(trained.probes, origin)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in files.items():
            _write(folder / name, content)
        if origin is None:
            for name in ("probes.json", "probes.safetensors"):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from None


def _answers(calibrations: Mapping[str, Calibration]) -> bytes:
    """Nothing was measured on answers: only a request for harm counts there, when all but sure."""
    judged = {
        name: Thresholds(max(one.text.strict, _SURE), max(one.probes.strict, _SURE))
        for name, one in calibrations.items()
        if name == "harmful_request"
    }
    return _json(AnswerThresholds(judged))


def table_file(table: text_table.Table, detectors: Sequence[str]) -> bytes:
    tensors: dict[str, NDArray[Any]] = {
        "table": table.table,
        "scale": table.scale,
        "bias": table.bias,
    }
    return save(tensors, {"detectors": ",".join(detectors)})


def probe_files(fitted: Mapping[str, probes.Probe], origin: Origin) -> dict[str, bytes]:
    """In the form that the engine reads: see ``fortpoint.engine.linear_probe``."""
    n_layers = len(origin.layers)
    weights = np.stack(
        [one.w.reshape(n_layers, -1).astype(np.float32) for one in fitted.values()], axis=1
    )
    bias = np.array([one.b for one in fitted.values()], dtype=np.float32)
    about = {
        "model": origin.model,
        "digest": origin.digest,
        "hook": "resid_post",
        "normalise": "rms",
        "probes": list(fitted),
        "layers": list(origin.layers),
    }
    tensors = save({"W": np.ascontiguousarray(weights), "b": bias})
    return {"probes.safetensors": tensors, "probes.json": _json(about)}


def _scores(trained: Trained, origin: Origin | None) -> bytes:
    scored, words = trained.scored(trained.mode), trained.scored("text")
    about = About(
        "" if origin is None else origin.model,
        "" if origin is None else origin.digest,
        trained.parts.by,
        trained.settings.false_positives,
        {n: getattr(c, trained.mode).threshold for n, c in trained.calibrations.items()},
    )
    lines = [msgspec.json.encode(about)]
    for index, one in enumerate(trained.examples):
        row = ScoreRow(
            one.text[:EXCERPT_CHARS],
            one.label,
            one.family,
            {name: round(float(values[index]), 6) for name, values in scored.scores.items()},
            {name: round(float(values[index]), 6) for name, values in words.scores.items()},
            bool(scored.blocked[index]),
        )
        lines.append(msgspec.json.encode(row))
    return b"\n".join(lines) + b"\n"


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
