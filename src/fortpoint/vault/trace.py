"""Whose copy a suspect was made from: one number for each lease, with a p-value that holds.

    evidence = collect(suspect, base, geometry)
    trace = identify(evidence, {lease.id: key for ...})
    trace.findings[0].corrected_p

``T_j = <psi, k_j> / ||psi||``, where ``psi`` is made of the suspect and the base alone. Under the
hypothesis that the suspect does not depend on lease ``j``'s carrier, ``k_j`` is independent of
``psi``, whatever was done to the suspect, and ``P(T_j >= t) <= exp(-t^2 / 2)`` exactly
(carriers.py). All leases are screened on the quietest matrices, the best then on every weight;
each number that was computed counts as a test, and no fewer than a million ever do.

Not protected here: a lease key that leaked before (then anybody could have made the suspect), a
base that is not the one that was marked, and a distilled model, which keeps no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.vault.align import MATRICES, NORMS, Geometry, align_layer, residual_rotation
from fortpoint.vault.carriers import Carrier
from fortpoint.vault.fingerprint import Weights
from fortpoint.vault.residual import residual
from fortpoint.vault.suspect import Suspect

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

OVERALL_LEVEL = 1e-9
MIN_TESTS = 1_000_000
SCREEN_WEIGHTS = 8_000_000
FULL_LEASES = 64
EMBEDDING = "model.embed_tokens.weight"

_THREADS = 2
_LARGEST = 1e6
_EQUAL = "does not differ from the base: it carries no mark, and is the plain original"


@dataclass(frozen=True, eq=False)
class Evidence:
    """``psi`` by tensor, the quietest first. ``missing`` counts matrices that could not be read;
    ``turned`` says whether the residual stream had been rotated."""

    suspect: str
    psi: dict[str, Floats]
    missing: int
    turned: bool

    @property
    def n_weights(self) -> int:
        """Of the base's marked weights that the suspect says something about."""
        return sum(int(np.count_nonzero(part)) for part in self.psi.values())


class Finding(msgspec.Struct, frozen=True):
    """One lease. ``p`` bounds the chance that an innocent one scores as much; ``corrected_p``
    that any of all would. ``n_weights`` were compared; ``scope`` says whether that is all."""

    lease: str
    statistic: float
    p: float
    corrected_p: float
    identified: bool
    scope: str
    n_weights: int


class Trace(msgspec.Struct, frozen=True):
    """``findings`` by falling statistic. ``threshold`` is the statistic that identifies."""

    suspect: str
    findings: tuple[Finding, ...]
    n_leases: int
    n_tests: int
    threshold: float
    n_weights: int
    missing: int
    turned: bool

    @property
    def identified(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.identified)


def collect(
    suspect: Suspect,
    base: Weights,
    geometry: Geometry,
    progress: Progress = lambda stage, done, total: None,
) -> Evidence:
    """Align the suspect to the base, layer by layer. Raises ``ModelError`` when nothing fits."""
    embedding = suspect.get(EMBEDDING) if EMBEDDING in base else None
    rotation = None
    if embedding is not None:
        rotation = residual_rotation(_tamed(embedding), base.get(EMBEDDING))
    blocks = _blocks(base)
    weighed: list[tuple[float, str, Floats]] = []
    n_read = 0
    for done, block in enumerate(blocks):
        progress("align", done, len(blocks))
        own = {name: base.get(block + path) for name, path in _present(base, block)}
        theirs = {name: suspect.get(block + path) for name, path in _present(base, block)}
        there = {name: _tamed(part) for name, part in theirs.items() if part is not None}
        for name, matrix in align_layer(there, own, geometry, rotation).items():
            n_read += 1
            psi = residual(matrix, own[name]).reshape(-1)
            if information := float(psi @ psi):
                weighed.append((information / psi.size, block + MATRICES[name], psi))
    if not weighed:
        reason = "has no matrix of the base's names and shapes" if not n_read else _EQUAL
        raise ModelError(f"{suspect.name} {reason}")
    weighed.sort(key=lambda entry: -entry[0])
    present = sum(1 for block in blocks for name, _ in _present(base, block) if name in MATRICES)
    psi_by_name = {name: psi for _, name, psi in weighed}
    return Evidence(suspect.name, psi_by_name, present - n_read, rotation is not None)


def statistic(evidence: Mapping[str, Floats], key: bytes) -> float:
    """``T`` of one lease over these tensors."""
    total = sum(Carrier(key, name).dot(psi) for name, psi in evidence.items())
    return total / math.sqrt(sum(float(psi.astype(np.float64) @ psi) for psi in evidence.values()))


def identify(
    evidence: Evidence,
    keys: Mapping[str, bytes],
    progress: Progress = lambda stage, done, total: None,
    screen_weights: int = SCREEN_WEIGHTS,
) -> Trace:
    """Screen every lease, then score the best on all weights."""
    subset = _quietest(evidence.psi, screen_weights)
    names = list(keys)
    screened = dict(zip(names, _score(subset, keys, names, "screen", progress), strict=True))
    best = sorted(names, key=lambda name: -screened[name])[:FULL_LEASES]
    full = dict(zip(best, _score(evidence.psi, keys, best, "compare", progress), strict=True))
    n_tests = max(MIN_TESTS, len(names) + len(best))
    sizes = {"screen": _count(subset), "full": evidence.n_weights}
    findings = [
        _finding(name, full.get(name, screened[name]), n_tests, name in full, sizes)
        for name in names
    ]
    return Trace(
        suspect=evidence.suspect,
        findings=tuple(sorted(findings, key=lambda finding: -finding.statistic)),
        n_leases=len(names),
        n_tests=n_tests,
        threshold=math.sqrt(2 * math.log(n_tests / OVERALL_LEVEL)),
        n_weights=evidence.n_weights,
        missing=evidence.missing,
        turned=evidence.turned,
    )


def p_value(t: float) -> float:
    """Bound on the chance that an innocent lease's statistic is ``t`` or more."""
    return math.exp(-t * t / 2) if t > 0 else 1.0


def _finding(
    lease: str, t: float, n_tests: int, is_full: bool, sizes: Mapping[str, int]
) -> Finding:
    corrected = min(1.0, n_tests * p_value(t))
    scope = "full" if is_full else "screen"
    guilty = corrected <= OVERALL_LEVEL
    return Finding(lease, t, p_value(t), corrected, guilty, scope, sizes[scope])


def _score(
    psi: Mapping[str, Floats],
    keys: Mapping[str, bytes],
    names: Sequence[str],
    stage: str,
    progress: Progress,
) -> Iterator[float]:
    norm = math.sqrt(sum(float(part.astype(np.float64) @ part) for part in psi.values()))

    def one(name: str) -> float:
        return sum(Carrier(keys[name], tensor).dot(part) for tensor, part in psi.items()) / norm

    with ThreadPoolExecutor(_THREADS) as pool:
        for done, score in enumerate(pool.map(one, names)):
            progress(stage, done, len(names))
            yield score


def _tamed(matrix: Floats) -> Floats:
    """Zero, as if pruned, where a value is none that a weight could have."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(matrix) < _LARGEST, matrix, np.float32(0))


def _quietest(psi: Mapping[str, Floats], n_weights: int) -> dict[str, Floats]:
    """Whole tensors, or the beginning of one, up to ``n_weights``."""
    chosen: dict[str, Floats] = {}
    for name, part in psi.items():
        left = n_weights - sum(map(len, chosen.values()))
        if left <= 0:
            break
        chosen[name] = part[:left]
    return chosen


def _count(psi: Mapping[str, Floats]) -> int:
    return sum(int(np.count_nonzero(part)) for part in psi.values())


def _blocks(base: Weights) -> list[str]:
    ends = {name.rpartition(MATRICES["gate"])[0] for name in base.names if "gate_proj" in name}
    return sorted(ends, key=lambda block: int(block.rstrip(".").rpartition(".")[2]))


def _present(base: Weights, block: str) -> list[tuple[str, str]]:
    return [(name, path) for name, path in {**MATRICES, **NORMS}.items() if block + path in base]
