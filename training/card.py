"""Writes ``CARD.md`` beside the artefacts: how they were made, on what, how well."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fortpoint.guard.calibration import Calibration
from training.calibrate import BUDGETS
from training.harvest import LAYERS, LONG_TOKENS, MAX_TOKENS
from training.measure import BENIGN_GROUPS, Scored
from training.rows import BENIGN, DETECTORS, Row

_TASKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("attack: jailbreak or injection", "attack", ("jailbreak", "injection")),
    ("jailbreak", "jailbreak", ("jailbreak",)),
    ("injection", "injection", ("injection",)),
    ("harmful_request", "harmful_request", ("harmful_request",)),
)


def write(
    trained: Sequence[Row],
    read: Mapping[str, Scored],
    text: Mapping[str, Scored],
    calibrations: Mapping[str, Calibration],
    n_tokens: Sequence[int],
) -> str:
    """The card. ``read`` and ``text`` hold the scores with and without readings, ``n_tokens`` how
    much of each text was read inside the model."""
    parts = [
        _INTRODUCTION.format(
            layers=", ".join(map(str, LAYERS)),
            limit=LONG_TOKENS,
            long=sum(n > MAX_TOKENS for n in n_tokens),
            all=len(n_tokens),
            short=MAX_TOKENS,
        ),
        _detection(read["tail"], text["text"]),
        _alarms(read["tail"], text["text"]),
        _thresholds(calibrations),
        _data(trained),
        _LIMITS,
    ]
    return "\n".join(parts)


def _detection(read: Scored, text: Scored) -> str:
    lines = [
        "## Detection, on families left out\n",
        "AUROC of a family's attacks against benign rows, by models that saw no row of that",
        "family, and the share that is blocked (by any detector) at the shipped thresholds.",
        "*Plain* compares with ordinary benign rows, *all* with hard benign rows too. Benign sets",
        "are weighted by the root of their size, so that short bank questions do not decide. The",
        "penalties and the joining function were chosen on these same left-out scores, so the",
        "figures are a little kind; each fold leaves out further families beside the one named,",
        "so they are a little harsh as well.\n",
    ]
    for title, detector, labels in _TASKS:
        lines += [
            f"### {title}\n",
            "| family left out | rows | AUROC, plain | AUROC, all | text only, all | blocked | "
            "blocked, text only |",
            "|---|---|---|---|---|---|---|",
        ]
        columns: list[tuple[float, float, float]] = []
        for family in read.families(labels):
            figures = (
                read.auroc(detector, labels, family, ("benign",)),
                read.auroc(detector, labels, family, BENIGN),
                text.auroc(detector, labels, family, BENIGN),
            )
            columns.append(figures)
            rate, rate_text = read.caught(labels, family), text.caught(labels, family)
            lines.append(
                f"| {family} | {rate.n} | "
                + " | ".join(f"{f:.3f}" for f in figures)
                + f" | {rate.hits / rate.n:.0%} | {rate_text.hits / max(rate_text.n, 1):.0%} |"
            )
        means = (math.fsum(column) / len(columns) for column in zip(*columns, strict=True))
        lines.append("| **mean** | | " + " | ".join(f"**{m:.3f}**" for m in means) + " | | |\n")
    lines.append(
        f"Orders hidden in documents (never trained on): blocked {read.caught_hidden()} as a "
        "user's text.\n"
    )
    return "\n".join(lines)


def _alarms(read: Scored, text: Scored) -> str:
    lines = [
        "## False positives\n",
        "Benign texts blocked by any detector at the shipped thresholds, with 95 % Wilson",
        "intervals, scored by models that did not see the set (role prompts: the row's cluster).",
        "*Evaluation only* sets shaped nothing at all.\n",
        "| benign set | with readings | text only |",
        "|---|---|---|",
    ]
    for name, belongs in BENIGN_GROUPS:
        lines.append(
            f"| {name} | {read.false_positives(belongs)} | {text.false_positives(belongs)} |"
        )
    return "\n".join(lines) + "\n"


def _thresholds(calibrations: Mapping[str, Calibration]) -> str:
    lines = [
        "## Thresholds\n",
        "Chosen on left-out scores of rows that may train: the lowest value at which the detector",
        "alone blocks at most "
        + ", ".join(f"{budget:.2%} of {name}" for name, budget, _ in BUDGETS)
        + ".",
        "*Strict* allows a tenth of that and applies to system and assistant text that a client",
        "supplies.\n",
        "| detector | with tail | strict | without tail | strict | text only | strict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in DETECTORS:
        one = calibrations[name]
        values = (v for m in (one.tail, one.probes, one.text) for v in (m.threshold, m.strict))
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _data(trained: Sequence[Row]) -> str:
    counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in trained:
        if row.train and not row.hidden:
            count = counts[row.dataset, row.label, row.licence]
            count[0] += 1
            count[1] += row.read
    lines = [
        "## Training rows\n",
        "Only rows whose licence lets them shape what ships. *Read* rows trained the probes too.",
        "`written` are requests of our own (`training/prompts.py`).\n",
        "| set | label | licence | rows | read |",
        "|---|---|---|---|---|",
    ]
    for (dataset, label, licence), (n, n_read) in sorted(counts.items()):
        lines.append(f"| {dataset} | {label} | {licence} | {n} | {n_read} |")
    total, total_read = (sum(c[i] for c in counts.values()) for i in (0, 1))
    lines.append(f"| **all** | | | **{total}** | **{total_read}** |\n")
    return "\n".join(lines)


_INTRODUCTION = """\
# The guard's shipped detectors

Written by `python -m training.guard`; do not edit. Three detectors (jailbreak, injection,
harmful_request) for SmolLM2-135M-Instruct, each a logistic function of

- a **text model**: hashed byte 3- to 5-grams and word 1- to 3-grams, one table of weights;
- a **linear probe** on the message's tokens and one on the template tokens that end the
  prompt, both on the residual stream `x / rms(x)` after blocks {layers}.

Both are L2-regularised logistic regressions; each data set of n rows counts as the root of n.
A jailbreak is a weaker positive for injection and the reverse; no detector's positive is
another's negative. Each text was read as one user turn from its start, at most {limit} tokens
({long} of {all} beyond the first {short}), seven in ten under the template's own system prompt.
"""

_LIMITS = """\
## What it does not do

- It is English first. Other languages are seen in a few hundred rows.
- Encodings (base64, ROT, leetspeak, spaced letters) are not decoded.
- An order inside a document that reads like any ordinary request is hardly found: see bipia,
  injecagent and asb_agent_security_bench above.
- An attacker who may try many wordings will find one that passes.
- Scores are calibrated where half of the rows are attacks; in ordinary traffic a score of 0.9
  is far less than nine in ten.
"""
