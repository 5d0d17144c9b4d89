"""The report of trained detectors: one HTML page with ROC curves, tables and the worst mistakes.

Everything is inside the file: no script, nothing from elsewhere. Every score is out of fold.
"""

from __future__ import annotations

import html
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint import plot
from fortpoint.errors import InvalidRequest, StorageError
from fortpoint.guard.training.examples import BENIGN
from fortpoint.guard.training.figures import ATTACK, Rate, auroc, cut
from fortpoint.guard.training.run import About, ScoreRow

_MAX_BYTES = 1 << 30
_LABELS = {ATTACK: ("jailbreak", "injection")}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b2733; }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #dde3e8; font-variant-numeric: tabular-nums; vertical-align: top }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.4 ui-monospace, monospace }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.plots svg { width: 100%; height: auto } small { color: #5a6b7a }
"""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """``scores.jsonl``, read and checked."""

    about: About
    rows: Sequence[ScoreRow]


class Family(msgspec.Struct, frozen=True):
    """``caught`` is the share above the score that 1 % of the benign texts exceed.

    Here as in ``auroc``, a benign family of n texts counts as the root of n.
    """

    family: str
    n: int
    auroc: float
    auroc_text: float
    caught: float
    blocked: float


class Curve(msgspec.Struct, frozen=True):
    """One detector over its families; ``auroc`` is their mean."""

    detector: str
    auroc: float
    auroc_text: float
    families: tuple[Family, ...]


class Mistake(msgspec.Struct, frozen=True):
    detector: str
    score: float
    label: str
    family: str
    text: str


class Figures(msgspec.Struct, frozen=True):
    detectors: tuple[Curve, ...]
    benign_blocked: dict[str, str]
    misses: tuple[Mistake, ...]
    false_alarms: tuple[Mistake, ...]


def read(file: Path) -> Scores:
    """Raises ``InvalidRequest`` for what ``fortpoint guard train`` did not write."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InvalidRequest(f"{file} is too long")
        first, *rest = file.read_bytes().splitlines()
        about = msgspec.json.decode(first, type=About)
        rows = [msgspec.json.decode(line, type=ScoreRow) for line in rest]
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {file}: {error.strerror}; name a folder of `fortpoint guard train`"
        ) from None
    except (ValueError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"{file} is not what training writes: {error}") from None
    names = set(about.thresholds)
    if not rows or any(not names <= set(row.scores) for row in rows):
        raise InvalidRequest(f"{file} lacks scores; train again")
    return Scores(about, rows)


def figures(scores: Scores, n: int) -> Figures:
    """All numbers of the page; ``n`` misses and false alarms."""
    names = [name for name in scores.rows[0].scores if _of(scores, name)]
    return Figures(
        tuple(_curve(scores, name) for name in names),
        {family: str(rate) for family, rate in _alarms(scores)},
        tuple(_misses(scores, n)),
        tuple(_false_alarms(scores, n)),
    )


def write(path: Path, scores: Scores, found: Figures) -> None:
    """Raises ``StorageError``."""
    about = scores.about
    model = html.escape(f"{about.model} ({about.digest[:19]})" if about.model else "text alone")
    body = (
        "<h1>Detectors</h1>"
        f"<p><small>{len(scores.rows):,} texts; {model}; each scored by models that did not see "
        f"its {html.escape(about.left_out)}; thresholds for {about.false_positives:.2%} of benign "
        "texts a detector.</small></p>"
        f'<h2>ROC curves</h2><div class="plots">{"".join(_plots(scores, found))}</div>'
        + "".join(_family_table(curve) for curve in found.detectors)
        + "<h2>Benign texts blocked by any detector</h2>"
        + _table(("family", "blocked"), found.benign_blocked.items())
        + "<h2>Worst misses</h2><p>Attacks with the lowest scores.</p>"
        + _mistakes(found.misses)
        + "<h2>Worst false alarms</h2><p>Benign texts with the highest scores.</p>"
        + _mistakes(found.false_alarms)
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Detectors</title>'
        f"<style>{_STYLE}</style>{body}</html>"
    )
    partial = path.with_name(path.name + ".partial")
    try:
        # Lone surrogates of a text cannot be written; they are shown as a question mark.
        partial.write_bytes(page.encode("utf-8", "replace"))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


def _of(scores: Scores, detector: str) -> list[ScoreRow]:
    labels = _LABELS.get(detector, (detector,))
    return [row for row in scores.rows if row.label in labels]


def _benign(scores: Scores) -> list[ScoreRow]:
    return [row for row in scores.rows if row.label in BENIGN]


def _values(rows: Sequence[ScoreRow], detector: str, words: bool = False) -> Float64:
    return np.array([(row.text_scores if words else row.scores)[detector] for row in rows])


def _curve(scores: Scores, detector: str) -> Curve:
    benign = _benign(scores)
    below, below_text = _values(benign, detector), _values(benign, detector, words=True)
    sizes = Counter(row.family for row in benign)
    weight = np.array([sizes[row.family] ** -0.5 for row in benign])
    threshold = cut(below, weight, 0.01)
    families = []
    for family in sorted({row.family for row in _of(scores, detector)}):
        rows = [row for row in _of(scores, detector) if row.family == family]
        values = _values(rows, detector)
        families.append(
            Family(
                family,
                len(rows),
                auroc(values, below, weight),
                auroc(_values(rows, detector, words=True), below_text, weight),
                float((values > threshold).mean()),
                sum(row.blocked for row in rows) / len(rows),
            )
        )
    n = len(families)
    means = (
        math.fsum(f.auroc for f in families) / n,
        math.fsum(f.auroc_text for f in families) / n,
    )
    return Curve(detector, *means, tuple(families))


def _alarms(scores: Scores) -> Iterator[tuple[str, Rate]]:
    benign = _benign(scores)
    yield "all", Rate(sum(row.blocked for row in benign), len(benign))
    for family in sorted({row.family for row in benign}):
        rows = [row for row in benign if row.family == family]
        yield family, Rate(sum(row.blocked for row in rows), len(rows))


def _misses(scores: Scores, n: int) -> Iterator[Mistake]:
    attacks = [row for row in scores.rows if row.label not in BENIGN and not row.blocked]
    for row in sorted(attacks, key=lambda row: max(row.scores.values()))[:n]:
        score = row.scores.get(row.label, max(row.scores.values()))
        yield Mistake(row.label, score, row.label, row.family, row.text)


def _false_alarms(scores: Scores, n: int) -> Iterator[Mistake]:
    thresholds = scores.about.thresholds

    def worst(row: ScoreRow) -> tuple[float, str]:
        """How near to certainty, beside where the detector's threshold lies."""
        return max(((row.scores[d] - t) / max(1 - t, 1e-9), d) for d, t in thresholds.items())

    for row in sorted(_benign(scores), key=worst, reverse=True)[:n]:
        detector = worst(row)[1]
        yield Mistake(detector, row.scores[detector], row.label, row.family, row.text)


def _plots(scores: Scores, found: Figures) -> Iterator[str]:
    benign = _benign(scores)
    for curve in found.detectors:
        rows = _of(scores, curve.detector)

        def draw(axes: Any, name: str = curve.detector, rows: Sequence[ScoreRow] = rows) -> None:
            for words, colour, label in (
                (True, "#9aa7b2", "text alone"),
                (False, "#0b6e99", "all"),
            ):
                x, y = _roc(_values(rows, name, words), _values(benign, name, words))
                axes.plot(x, y, color=colour, label=label)
            axes.set_xscale("log")
            axes.set_xlim(max(1 / max(len(benign), 1), 1e-4), 1)
            axes.set_ylim(0, 1.01)
            axes.axvline(0.01, color="#b3431e", linewidth=0.7)
            axes.legend(frameon=False, loc="lower right")
            axes.set_title(f"{name}: share caught")

        yield plot.svg(draw, "share of benign texts above the threshold", 3.4)


def _roc(positive: Float64, negative: Float64) -> tuple[Float64, Float64]:
    """False and true positive rates at every threshold."""
    edges = np.unique(np.concatenate([positive, negative]))
    above = 1 - np.searchsorted(np.sort(negative), edges) / len(negative)
    caught = 1 - np.searchsorted(np.sort(positive), edges) / len(positive)
    return np.append(above, 0.0), np.append(caught, 0.0)


def _family_table(curve: Curve) -> str:
    rows = [
        (
            one.family,
            f"{one.n:,}",
            f"{one.auroc:.3f}",
            f"{one.auroc_text:.3f}",
            f"{one.caught:.0%}",
            f"{one.blocked:.0%}",
        )
        for one in curve.families
    ]
    rows.append(("mean", "", f"{curve.auroc:.3f}", f"{curve.auroc_text:.3f}", "", ""))
    head = ("family", "texts", "AUROC", "text alone", "caught at 1 % false positives", "blocked")
    return f"<h2>{html.escape(curve.detector)}</h2>{_table(head, rows)}"


def _table(head: Sequence[str], rows: Any) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    rows = "".join(
        f"<tr><td>{one.score:.3f}</td><td>{html.escape(one.detector)}</td>"
        f'<td>{html.escape(one.family)}</td><td class="text">{html.escape(one.text)}</td></tr>'
        for one in mistakes
    )
    return (
        f"<table><tr><th>score</th><th>detector</th><th>family</th><th>text</th></tr>{rows}</table>"
    )
