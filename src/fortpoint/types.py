"""Types that cross rooms: a conversation, what the engine read inside the model, a verdict.

Engine and guard do not import each other; what one reads and the other judges travels as
the types here. They hold plain values only, so that they can cross a process boundary.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec


class Role(StrEnum):
    """Who wrote a token. ``TEMPLATE`` marks the tokens that the chat template adds."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    TEMPLATE = "template"


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation. ``role`` is never ``TEMPLATE``."""

    role: Role
    content: str


class Segment(msgspec.Struct, frozen=True):
    """Prompt tokens ``start`` (inclusive) to ``end`` (exclusive) and who wrote them.

    ``message`` is the index of the message they come from, -1 for template tokens.
    """

    role: Role
    message: int
    start: int
    end: int


class FeatureReading(msgspec.Struct, frozen=True):
    """The strongest features of one dictionary at each token.

    ``indices`` is little-endian int32 ``[n_tokens, top]``, strongest first, -1 where fewer
    were active; ``values`` float32 of the same shape, in units of each feature's training
    maximum.
    """

    dictionary: str
    top: int
    indices: bytes
    values: bytes


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was read in the residual stream: the linear probes, and features where asked for.

    ``logits`` is a C-ordered little-endian float32 array of shape ``[n_tokens, n_probes]``:
    one logit for each token and probe. ``segments`` cover all ``n_tokens`` of a prompt in
    order. ``targets`` are the features and directions that this server reads at every token, and
    ``target_values`` how active each is: float32 ``[n_tokens, n_targets]``, in units of their
    training maxima. The reading of one answer token names no probes and no targets and has no
    segments: its columns are those of the prompt's reading.
    """

    probes: tuple[str, ...]
    n_tokens: int
    logits: bytes
    segments: tuple[Segment, ...]
    features: tuple[FeatureReading, ...] = ()
    targets: tuple[str, ...] = ()
    target_values: bytes = b""


class Score(msgspec.Struct, frozen=True):
    """One detector's judgement: a calibrated probability, where it was found, its threshold.

    ``form`` names the codes (``base64+rot13``) that the judged text was decoded from; absent
    where the text was judged as it stands.
    """

    detector: str
    score: float
    threshold: float
    role: Role
    flagged: bool
    form: str | msgspec.UnsetType = msgspec.UNSET


def rank(score: Score) -> tuple[bool, float]:
    """What makes one score of a detector count before another."""
    return score.flagged, score.score


Action = Literal["allow", "flag", "redact", "block", "failed"]
"""What is done about a text, from the mildest to the gravest."""


class Turn(msgspec.Struct, frozen=True):
    """What was found in one message of the user, taken alone."""

    message: int
    scores: tuple[Score, ...]


class Verdict(msgspec.Struct, frozen=True):
    """The guard's decision on one text, prompt or answer.

    ``flag`` lets it pass and says so in the record; ``redact`` lets an answer pass without what
    was found in it. ``failed`` is never a pass: the request is refused with ``guard_failed``.
    ``scores`` has each detector's highest score of each role, since a policy may ask less of a
    tool than of a user; ``detector`` names the one that decided.
    ``turns`` has the user's messages one by one, where a guard says so; no record holds it.
    """

    action: Action
    detector: str | None
    scores: tuple[Score, ...]
    turns: tuple[Turn, ...] | msgspec.UnsetType = msgspec.UNSET

    def strongest(self) -> dict[str, Score]:
        """Each detector's highest score, whosever words it found."""
        found: dict[str, Score] = {}
        for score in self.scores:
            found[score.detector] = max(found.get(score.detector, score), score, key=rank)
        return found


class Found(msgspec.Struct, frozen=True):
    """Characters ``start`` (inclusive) to ``end`` (exclusive) of an answer that a rule found."""

    start: int
    end: int
    detector: str


class Review(msgspec.Struct, frozen=True):
    """What is known of an answer that still grows.

    ``scores`` has each detector's highest score so far, ``found`` all that rules found, in
    order. Of the first ``settled`` characters, rules have found all that there is.
    """

    scores: tuple[Score, ...]
    found: tuple[Found, ...]
    settled: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request; ``prompt`` counts template tokens too.

    ``estimated`` is True, and otherwise absent, where nobody counted and an engine guessed.
    """

    prompt: int = 0
    completion: int = 0
    estimated: bool | msgspec.UnsetType = msgspec.UNSET
