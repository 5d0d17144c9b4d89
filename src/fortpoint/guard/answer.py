"""Judges an answer while it grows, so that what is unsafe in it never leaves.

    answer = guard.answer(prefilled.reading.probes)     # one for each choice
    answer.add(token.text, token.reading)               # for each token; cheap
    review = answer.review(final=False)                 # every few tokens: what is known by now

Three readers, each of which looks at new text and new tokens once:

- the **text model** scores the last ``TAIL_CHARS`` characters (and all that is new), so a long
  answer costs the same for each of its tokens as a short one;
- the **linear probes** count as the mean over the last ``WINDOW_TOKENS`` tokens. The engine read
  each token's logits where the token was chosen;
- the **rules** find secrets and canaries, also when they are cut over any number of tokens, and
  say up to which character they have found all that there is.

A detector's score never falls while an answer grows: each kind of evidence counts with its
highest value so far. Which detectors apply to answers, and from which score on, is measured on
ordinary answers of the embedded model (``artefacts/answers.json``); they were trained on what
users write. Not seen: what the model says between the lines, in a language or an encoding that
the detectors do not know.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ConfigError, GuardFailed, ModelError
from fortpoint.guard.detector import Detector, Passage
from fortpoint.guard.linear_probe import WINDOW_TOKENS, aggregate
from fortpoint.guard.rules.canary import DETECTOR as CANARY
from fortpoint.guard.rules.canary import Canaries
from fortpoint.guard.rules.finding import Finding
from fortpoint.guard.rules.secrets import DETECTOR as SECRET
from fortpoint.guard.rules.stream import SecretScanner
from fortpoint.guard.text_model import TextModel
from fortpoint.types import Found, Reading, Review, Role, Score

TAIL_CHARS = 600
RULES = (SECRET, CANARY)

_RULE_THRESHOLD = 0.75
_UNREAD_TOKENS = 1  # text that a stop condition set free belongs to no token

Float32 = NDArray[np.float32]


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From which score on a detector acts on an answer, by the evidence at hand."""

    text: float
    probes: float


class AnswerThresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The detectors that apply to answers; others say nothing about them."""

    detectors: dict[str, Thresholds]

    @classmethod
    def load(cls, file: Path) -> AnswerThresholds:
        """Raises ``ModelError`` when the file is missing or not of this form."""
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ModelError(f"the guard's {file.name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Watched:
    """A detector that applies to answers, and the score from which on it acts."""

    detector: Detector
    threshold: float


class Answer:
    """One answer. ``columns`` maps a probe to its column in the tokens' readings; None where
    the answer is judged by its text alone."""

    def __init__(
        self,
        text_model: TextModel,
        watched: Sequence[Watched],
        scanner: SecretScanner,
        rule_thresholds: Mapping[str, float],
        columns: Mapping[str, int] | None,
    ) -> None:
        self._text_model = text_model
        self._watched = tuple(watched)
        self._scanner = scanner
        self._rule_thresholds = rule_thresholds
        self._new: list[str] = []
        self._tail = ""
        self._n_chars = 0
        self._text: Float32 | None = None
        self._probes = None if columns is None else _RollingProbes(columns)
        self._found: list[Found] = []
        self._rule_scores = dict.fromkeys(rule_thresholds, 0.0)

    def add(self, text: str, reading: Reading | None) -> None:
        """The next token: what it adds to the text, and what was read where it was chosen."""
        self._new.append(text)
        if self._probes is not None:
            self._probes.add(reading)

    def review(self, *, final: bool) -> Review:
        """All that is known now; ``final`` when no more tokens come. Raises ``GuardFailed``."""
        new = "".join(self._new)
        self._new.clear()
        self._n_chars += len(new)
        self._scan(new, final=final)
        if new or self._text is None:
            self._read(new)
        return Review(
            (*self._detected(), *self._ruled()),
            tuple(self._found),
            self._n_chars - self._scanner.n_held,
        )

    def _scan(self, new: str, *, final: bool) -> None:
        findings = [*self._scanner.feed(new).findings]
        if final:
            findings += self._scanner.flush().findings
        for finding in findings:
            self._note(finding)

    def _note(self, finding: Finding) -> None:
        name = finding.detector
        threshold = self._rule_thresholds.get(name)
        if threshold is None:
            raise GuardFailed(f"the rule {name} has no threshold for answers")
        self._rule_scores[name] = max(self._rule_scores[name], finding.score)
        if finding.score >= threshold:
            self._found.append(Found(finding.start, finding.end, name))

    def _read(self, new: str) -> None:
        passage = (self._tail + new)[-(TAIL_CHARS + len(new)) :]
        self._tail = passage[-TAIL_CHARS:]
        logits = self._text_model.logits(passage).max(axis=0)
        self._text = logits if self._text is None else np.maximum(self._text, logits)

    def _detected(self) -> list[Score]:
        if self._text is None:
            raise GuardFailed("an answer was not read")
        text = dict(zip(self._text_model.detectors, self._text.tolist(), strict=True))
        passage = Passage(text, None if self._probes is None else self._probes.highest())
        return [self._score(watched, passage) for watched in self._watched]

    @staticmethod
    def _score(watched: Watched, passage: Passage) -> Score:
        score = watched.detector.judge(passage).score
        flagged = score >= watched.threshold
        name = watched.detector.name
        return Score(name, round(score, 6), watched.threshold, Role.ASSISTANT, flagged)

    def _ruled(self) -> list[Score]:
        scores = []
        for name, threshold in self._rule_thresholds.items():
            score = self._rule_scores[name]
            flagged = score >= threshold
            scores.append(Score(name, score, threshold, Role.ASSISTANT, flagged))
        return scores


class _RollingProbes:
    """Each probe's highest mean over the last ``WINDOW_TOKENS`` tokens, as they come."""

    def __init__(self, columns: Mapping[str, int]) -> None:
        self._columns = columns
        self._new: list[bytes] = []
        self._n_unread = 0
        self._window = np.empty((0, len(columns)), np.float32)
        self._highest: Float32 | None = None

    def add(self, reading: Reading | None) -> None:
        if reading is None:
            self._n_unread += 1
        else:
            self._new.append(reading.logits)

    def highest(self) -> dict[str, float] | None:
        """None before the first reading. Raises ``GuardFailed`` for readings that do not fit:
        text alone would be a weaker guard than the one that was asked for."""
        if self._n_unread > _UNREAD_TOKENS:
            raise GuardFailed("an answer was not read inside the model")
        if self._new:
            self._take()
        if self._highest is None:
            return None
        values = self._highest.tolist()
        return {name: values[column] for name, column in self._columns.items()}

    def _take(self) -> None:
        width = len(self._columns)
        if any(len(row) != 4 * width for row in self._new):
            raise GuardFailed("a token's reading does not have the size it states")
        rows = np.frombuffer(b"".join(self._new), "<f4").reshape(-1, width)
        self._new.clear()
        if not np.isfinite(rows).all():
            raise GuardFailed("a token's reading holds values that are not finite")
        rows = np.concatenate([self._window, rows])
        self._window = rows[1 - WINDOW_TOKENS :]  # the next token completes a window
        mean = aggregate(rows)
        self._highest = mean if self._highest is None else np.maximum(self._highest, mean)


class Answers:
    """What it takes to judge answers; ``begin`` one for each choice."""

    def __init__(
        self,
        text_model: TextModel,
        detectors: Sequence[Detector],
        shipped: AnswerThresholds,
        configured: Mapping[str, float],
        canaries: Mapping[str, str],
    ) -> None:
        """``configured`` thresholds take the shipped ones' place. ``canaries`` maps a name that
        may be shown to a text that must never come out. Raises ``ConfigError``."""
        known = (*shipped.detectors, *RULES)
        for name in configured:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ConfigError(
                    f"guard.answer_thresholds: {name!r} does not judge answers; "
                    f"did you mean {near[0]!r}?"
                )
        self._text_model = text_model
        self._canaries = Canaries(canaries)
        self._rule_thresholds = {name: configured.get(name, _RULE_THRESHOLD) for name in RULES}
        chosen = [
            (detector, shipped.detectors[detector.name], configured.get(detector.name))
            for detector in detectors
            if detector.name in shipped.detectors
        ]
        self._by_text = [
            Watched(one, ours.text if own is None else own) for one, ours, own in chosen
        ]
        self._by_probes = [
            Watched(one, ours.probes if own is None else own) for one, ours, own in chosen
        ]

    def begin(self, probes: Sequence[str] | None) -> Answer:
        """``probes`` are those that each token's reading has; None judges by text alone."""
        return Answer(
            self._text_model,
            self._by_text if probes is None else self._by_probes,
            SecretScanner(self._canaries),
            self._rule_thresholds,
            None if probes is None else {name: column for column, name in enumerate(probes)},
        )
