"""Writes the card of an operator's detectors: how good they are, and what they learned from."""

from __future__ import annotations

import math
from collections import Counter

from fortpoint.guard.training.examples import BENIGN, such
from fortpoint.guard.training.figures import ATTACK
from fortpoint.guard.training.run import Origin, Trained

_TASKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (ATTACK, ("jailbreak", "injection")),
    ("jailbreak", ("jailbreak",)),
    ("injection", ("injection",)),
    ("harmful_request", ("harmful_request",)),
)


def write(trained: Trained, origin: Origin | None) -> str:
    """Markdown. The first figures are those on families left out."""
    return "\n".join(
        (
            _introduction(trained, origin),
            _detection(trained),
            _alarms(trained),
            _thresholds(trained),
            _examples(trained),
        )
    )


def _introduction(trained: Trained, origin: Origin | None) -> str:
    if origin is None:
        evidence = "text alone: hashed byte 3- to 5-grams and word 1- to 3-grams."
    else:
        layers = ", ".join(map(str, origin.layers))
        evidence = (
            "text (hashed n-grams) and two linear probes, on the message's tokens and on the "
            f"template's after it, after blocks {layers} of {origin.model} "
            f"(digest {origin.digest[:16]})."
        )
    return (
        "# Detectors of the operator's own\n\n"
        "Written by `fortpoint guard train`. Each detector is a logistic function of "
        f"{evidence}\n"
    )


def _detection(trained: Trained) -> str:
    what = {
        "family": "by models that saw no row of its family",
        "cluster": "by models that saw none of its near-duplicates; there are too few families to "
        "leave one out, so **attacks of another kind will be found less often than this**",
    }[trained.parts.by]
    scored, words = trained.scored(trained.mode), trained.scored("text")
    lines = [
        f"## Detection, each text scored {what}\n",
        "| detector | family left out | texts | AUROC | text alone | blocked |",
        "|---|---|---|---|---|---|",
    ]
    for detector, labels in _TASKS:
        if detector not in scored.scores:
            continue
        figures = []
        for family in scored.families(labels):
            belongs = such(labels, family)
            pair = scored.auroc(detector, belongs), words.auroc(detector, belongs)
            figures.append(pair)
            cells = f"{pair[0]:.3f} | {pair[1]:.3f} | {scored.rate(belongs)}"
            lines.append(f"| {detector} | {family} | {scored.rate(belongs).n} | {cells} |")
        means = [math.fsum(column) / len(column) for column in zip(*figures, strict=True)]
        lines.append(f"| **{detector}** | **mean** | | **{means[0]:.3f}** | **{means[1]:.3f}** | |")
    return "\n".join(lines) + "\n"


def _alarms(trained: Trained) -> str:
    scored = trained.scored(trained.mode)
    families = sorted({one.family for one in trained.examples if one.benign})
    lines = [
        "## False positives\n",
        "Benign texts that any detector blocks, with 95 % Wilson intervals, out of fold.\n",
        "| family | blocked |",
        "|---|---|",
        f"| **all** | {scored.rate(such(BENIGN))} |",
    ]
    lines += [f"| {family} | {scored.rate(such(BENIGN, family))} |" for family in families]
    return "\n".join(lines) + "\n"


def _thresholds(trained: Trained) -> str:
    lines = [
        "## Thresholds\n",
        "The lowest at which the detector alone blocks at most "
        f"{trained.settings.false_positives:.2%} of the benign texts, a set of n counted as the",
        "root of n. *Strict*, a fifth of that, is for system and assistant text of a client.\n",
        "| detector | threshold | strict | text alone | strict |",
        "|---|---|---|---|---|",
    ]
    for name, one in trained.calibrations.items():
        mode = getattr(one, trained.mode)
        values = (mode.threshold, mode.strict, one.text.threshold, one.text.strict)
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    n = sum(one.benign for one in trained.examples)
    if n * trained.settings.false_positives < 10:
        lines.append(
            f"\n{n} benign texts are few for this share: the thresholds hang on a handful of them."
        )
    return "\n".join(lines) + "\n"


def _examples(trained: Trained) -> str:
    counts = Counter((one.family, one.label) for one in trained.examples)
    lines = ["## Examples\n", "| family | label | texts |", "|---|---|---|"]
    lines += [f"| {family} | {label} | {n} |" for (family, label), n in sorted(counts.items())]
    return "\n".join(lines) + "\n"
