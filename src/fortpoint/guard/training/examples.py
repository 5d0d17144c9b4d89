"""Labelled texts to learn from, and the file that an operator brings them in.

    {"text": "...", "label": "injection", "family": "mails", "cluster": "17"}
    {"messages": [{"role": "user", "content": "..."}], "label": "benign"}

A ``label`` is a detector's name, ``benign``, or ``benign_hard`` for what looks bad and is fine. A
``family`` is where a text comes from: figures are made by leaving families out whole. Texts of one
``cluster`` are near-duplicates and never parted; without one, texts that begin alike are.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fortpoint.errors import InvalidRequest
from fortpoint.guard.text_model import canonical
from fortpoint.types import Message, Role

DETECTORS = ("jailbreak", "injection", "harmful_request")
BENIGN = ("benign", "benign_hard")
LABELS = (*BENIGN, *DETECTORS)

MIN_ROWS = 20  # of each label that is there, and of benign texts
_MAX_ROWS = 500_000
_MAX_ROW_BYTES = 4 * 1024 * 1024
_MAX_NAME = 200
_CLUSTER_BYTES = 160


@dataclass(frozen=True)
class Example:
    """One text with what it is.

    ``source`` is the set it is weighted with, ``trains`` whether it may shape anything or is only
    measured, ``reliance`` how much its label says beside others'. ``before`` are the messages that
    the text, a user's, follows.
    """

    text: str
    label: str
    source: str
    family: str
    cluster: str
    trains: bool = True
    reliance: float = 1.0
    before: tuple[Message, ...] = ()

    @property
    def benign(self) -> bool:
        return self.label in BENIGN

    def target(self, detector: str) -> int:
        """1, 0, or -1 where the text says nothing about this detector: it is another attack."""
        return 0 if self.benign else 1 if self.label == detector else -1


class _Line(msgspec.Struct, frozen=True):
    label: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    family: str | None = None
    cluster: str | int | None = None


def read(file: Path) -> list[Example]:
    """The file's examples, equal texts once. Raises ``InvalidRequest``, which names the line."""
    found: dict[tuple[str, tuple[Message, ...]], Example] = {}
    try:
        for number, line in enumerate(_lines(file), 1):
            example = _example(line, number)
            known = found.setdefault((example.text, example.before), example)
            if known.benign != example.benign:
                raise InvalidRequest(f"line {number}: the same text has another label before")
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from None
    examples = list(found.values())
    _check(examples)
    return examples


def such(labels: Sequence[str], family: str | None = None) -> Callable[[Example], bool]:
    """Whether an example has one of these labels and is of this family, where one is named."""

    def belongs(one: Example) -> bool:
        return one.label in labels and family in (None, one.family)

    return belongs


def detectors_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The detectors that these examples can teach."""
    labels = {example.label for example in examples if example.trains}
    return tuple(name for name in DETECTORS if name in labels)


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number in range(1, _MAX_ROWS + 2):
            line = lines.readline(_MAX_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > _MAX_ROW_BYTES:
                raise InvalidRequest(f"line {number} is longer than {_MAX_ROW_BYTES} bytes")
            if number > _MAX_ROWS:
                raise InvalidRequest(f"there are more than {_MAX_ROWS} lines; train on a sample")
            yield line


def _example(line: bytes, number: int) -> Example:
    try:
        row = msgspec.json.decode(line, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"line {number} is no example: {error}") from None
    if row.label not in LABELS:
        near = difflib.get_close_matches(row.label, LABELS, n=1, cutoff=0.0)[0]
        raise InvalidRequest(
            f"line {number}: unknown label {row.label[:_MAX_NAME]!r}; did you mean {near!r}? "
            f"Labels are {', '.join(LABELS)}."
        )
    text, before = _content(row, number)
    family = row.family or row.label
    cluster = f"{family}/{row.cluster}" if row.cluster is not None else _alike(text)
    if len(family) > _MAX_NAME or len(cluster) > 2 * _MAX_NAME:
        raise InvalidRequest(f"line {number}: family and cluster are names, not texts")
    return Example(text, row.label, family, family, cluster, before=before)


def _content(row: _Line, number: int) -> tuple[str, tuple[Message, ...]]:
    if (row.text is None) == (row.messages is None):
        raise InvalidRequest(f"line {number}: give exactly one of text and messages")
    messages = row.messages or (Message(Role.USER, row.text or ""),)
    if any(message.role is Role.TEMPLATE for message in messages):
        raise InvalidRequest(f"line {number}: a role is system, user, assistant or tool")
    if not messages[-1].content.strip():
        raise InvalidRequest(f"line {number}: the text that is labelled is empty")
    return messages[-1].content, messages[:-1]


def _alike(text: str) -> str:
    return hashlib.sha256(canonical(text[: 2 * _CLUSTER_BYTES])[:_CLUSTER_BYTES]).hexdigest()[:16]


def _check(examples: Sequence[Example]) -> None:
    """Raises ``InvalidRequest`` for what nothing can be learned from."""
    counts = Counter("benign" if one.benign else one.label for one in examples)
    if len(counts) < 2 or not counts["benign"]:
        there = ", ".join(sorted(counts)) or "none"
        raise InvalidRequest(
            f"the examples need benign texts and one more label; the labels here: {there}"
        )
    for label, n in sorted(counts.items()):
        if n < MIN_ROWS:
            raise InvalidRequest(
                f"{n} different texts are {label}; at least {MIN_ROWS} of each label are needed"
            )
