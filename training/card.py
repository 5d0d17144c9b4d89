"""Writes ``CARD.md`` beside the artefacts: how they were made, on what, how well."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fortpoint.guard.calibration import Calibration
from fortpoint.guard.training.examples import BENIGN, DETECTORS, Example
from fortpoint.guard.training.figures import Rate, Scored
from training.groups import BUDGETS, REPORTED
from training.harvest import LAYERS, LONG_TOKENS, MAX_TOKENS
from training.rows import Row

_TASKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("attack: jailbreak or injection", "attack", ("jailbreak", "injection")),
    ("jailbreak", "jailbreak", ("jailbreak",)),
    ("injection", "injection", ("injection",)),
    ("harmful_request", "harmful_request", ("harmful_request",)),
)


@dataclass(frozen=True)
class Made:
    """``read`` and ``text`` are of the rows read inside the model, with and without readings."""

    rows: Sequence[Row]
    keys_read: Collection[str]
    read: Scored
    text: Scored
    calibrations: Mapping[str, Calibration]


def write(made: Made, n_tokens: Sequence[int]) -> str:
    """The card; ``n_tokens`` is how much of each text was read inside the model."""
    parts = [
        _INTRODUCTION.format(
            layers=", ".join(map(str, LAYERS)),
            limit=LONG_TOKENS,
            long=sum(n > MAX_TOKENS for n in n_tokens),
            all=len(n_tokens),
            short=MAX_TOKENS,
        ),
        _detection(made),
        _alarms(made),
        _thresholds(made.calibrations),
        _data(made),
        _LIMITS,
    ]
    return "\n".join(parts)


def _of(labels: Collection[str], family: str) -> Callable[[Example], bool]:
    """Attacks of a family, without orders hidden in documents."""

    def belongs(one: Example) -> bool:
        return one.label in labels and one.family == family and not _hidden(one)

    return belongs


def _hidden(one: Example) -> bool:
    return one.source.startswith("hidden:")


def _benign(labels: Collection[str]) -> Callable[[Example], bool]:
    """Benign texts of data sets."""

    def belongs(one: Example) -> bool:
        return one.label in labels and not one.source.startswith("written")

    return belongs


def _detection(made: Made) -> str:
    shaping = {row.family for row in made.rows if row.train and not row.own}
    lines = [
        "## Detection, on families left out\n",
        "AUROC of a family's attacks against benign rows, by models that saw no row of that",
        "family, and the share that is blocked (by any detector) at the shipped thresholds.",
        "*Plain* compares with ordinary benign rows, *all* with hard benign rows too. Benign sets",
        "are weighted by the root of their size, so that short bank questions do not decide.",
        "*At 1 %* is the share above the score that 1 % of all benign rows exceed. A star marks",
        "families that may only measure: they shaped nothing, not even a threshold. The penalties",
        "and the joining function were chosen on the others' left-out scores, so those figures",
        "are a little kind; each fold leaves out further families beside the one named, so they",
        "are a little harsh as well. Texts of our own are in every fold, and not measured.\n",
    ]
    for title, detector, labels in _TASKS:
        lines += [
            f"### {title}\n",
            "| family left out | rows | AUROC, plain | AUROC, all | text only, all | at 1 % | "
            "blocked | blocked, text only |",
            "|---|---|---|---|---|---|---|---|",
        ]
        columns: list[tuple[float, ...]] = []
        for family in _families(made.read, labels):
            belongs = _of(labels, family)
            figures = (
                made.read.auroc(detector, belongs, _benign(("benign",))),
                made.read.auroc(detector, belongs, _benign(BENIGN)),
                made.text.auroc(detector, belongs, _benign(BENIGN)),
                made.read.caught_at(detector, belongs, 0.01, _benign(BENIGN)),
            )
            columns.append(figures)
            rate, words = made.read.rate(belongs), made.text.rate(belongs)
            star = "" if family in shaping else " *"
            cells = " | ".join(f"{f:.3f}" for f in figures[:3])
            lines.append(
                f"| {family}{star} | {rate.n} | {cells} | {figures[3]:.0%} | {rate.share:.0%} | "
                f"{words.share:.0%} |"
            )
        means = [math.fsum(column) / len(column) for column in zip(*columns, strict=True)]
        cells = " | ".join(f"**{m:.3f}**" for m in means[:3])
        lines.append(f"| **mean** | | {cells} | **{means[3]:.0%}** | | |\n")
    lines.append(
        f"Orders hidden in documents (never trained on): blocked {_hidden_rate(made)} as a user's "
        "text.\n"
    )
    return "\n".join(lines)


def _families(scored: Scored, labels: Collection[str]) -> list[str]:
    measured = (one for one in scored.examples if one.label in labels and not _hidden(one))
    return sorted({one.family for one in measured if not one.family.startswith("written")})


def _hidden_rate(made: Made) -> Rate:
    return made.read.rate(lambda one: _hidden(one) and one.source != "hidden:written")


def _alarms(made: Made) -> str:
    lines = [
        "## False positives\n",
        "Benign texts blocked by any detector at the shipped thresholds, with 95 % Wilson",
        "intervals, scored by models that did not see the set (role prompts: the row's cluster).",
        "*Evaluation only* sets shaped nothing at all.\n",
        "| benign set | with readings | text only |",
        "|---|---|---|",
    ]
    for name, group in REPORTED:

        def belongs(one: Example, group: Callable[[Example], bool] = group) -> bool:
            return one.benign and group(one)

        lines.append(f"| {name} | {made.read.rate(belongs)} | {made.text.rate(belongs)} |")
    return "\n".join(lines) + "\n"


def _thresholds(calibrations: Mapping[str, Calibration]) -> str:
    lines = [
        "## Thresholds\n",
        "Chosen on left-out scores of rows that may train: the lowest value at which the detector",
        "alone blocks at most " + ", ".join(f"{b.share:.2%} of {b.name}" for b in BUDGETS) + ".",
        "*Strict* allows a fifth of that and applies to system and assistant text that a client",
        "supplies.\n",
        "| detector | with tail | strict | without tail | strict | text only | strict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in DETECTORS:
        one = calibrations[name]
        values = (v for m in (one.tail, one.probes, one.text) for v in (m.threshold, m.strict))
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _data(made: Made) -> str:
    counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in made.rows:
        if row.train and not row.hidden:
            count = counts[row.dataset, row.label, row.licence]
            count[0] += 1
            count[1] += row.key in made.keys_read
    lines = [
        "## Training rows\n",
        "Only rows whose licence lets them shape what ships. *Read* rows trained the probes too.",
        "Sets called `written...` are of our own making (`training/written.py`, `prompts.py`).\n",
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
- Encodings are not decoded by these detectors: `guard/obfuscation/` decodes a text before them.
- An order inside a document that reads like any ordinary request is hardly found: see bipia,
  injecagent and asb_agent_security_bench above.
- An attacker who may try many wordings will find one that passes.
- Scores are calibrated where half of the rows are attacks; in ordinary traffic a score of 0.9
  is far less than nine in ten.
"""
