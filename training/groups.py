"""Benign groups: which of them bound the thresholds, and which the card reports."""

from __future__ import annotations

from collections.abc import Callable

from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.joining import Budget

Belongs = Callable[[Example], bool]


def of(*sources: str) -> Belongs:
    """Texts of these data sets."""
    return lambda one: one.source in sources


def plain(one: Example) -> bool:
    """Ordinary texts that may train, without our own."""
    return one.label == "benign" and one.trains and not one.source.startswith("written")


# Highest share of each benign group that one detector may block, on families left out. Up to
# three detectors share what a group is allowed in all.
BUDGETS: tuple[Budget, ...] = (
    Budget("plain benign", 0.002, plain),
    Budget("NotInject", 0.025, of("piguard_notinject")),
    Budget("XSTest-safe", 0.04, of("xstest")),
    Budget("JailbreakBench benign", 0.10, of("jailbreakbench")),
    Budget("role prompts", 0.03, of("awesome_chatgpt_prompts")),
)

REPORTED: tuple[tuple[str, Belongs], ...] = (
    ("plain benign, rows that may train", plain),
    ("XSTest-safe", of("xstest")),
    (
        "NotInject (one, two, three)",
        lambda one: one.source == "piguard_notinject" and one.label == "benign_hard",
    ),
    ("JailbreakBench benign", of("jailbreakbench")),
    ("role prompts (awesome_chatgpt_prompts)", of("awesome_chatgpt_prompts")),
    ("alpaca_instructions, evaluation only", of("alpaca_instructions")),
    ("wizardlm_testset, evaluation only", of("wizardlm_testset")),
    ("safety_tuned_llamas benign, evaluation only", of("safety_tuned_llamas")),
    (
        "dialogues, encyclopaedia, technical documents, evaluation only",
        of("sgd_dialogues", "wikipedia", "ml_docs"),
    ),
)
