"""What a judged prompt says about who sent it: hashes and numbers for ``account_desk.py``.

    asked = asked_by(sender, now, request_id, new_texts, scores, verdict, sketcher)

Only what the caller wrote counts. What a tool brought (a web page that gives orders) is an
attack on the caller as much as on the model, and says nothing of its account.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fortpoint.guard.account import suspicion
from fortpoint.guard.account_watch import key_account
from fortpoint.guard.attack_families import Prompt
from fortpoint.guard.collusion import Asked
from fortpoint.guard.near_duplicates import Sketcher
from fortpoint.types import Action, Role, Score


@dataclass(frozen=True)
class Sender:
    """Whose key, and of which user."""

    key_id: str
    user: str


def asked_by(
    sender: Sender,
    now: float,
    request_id: str,
    texts: Sequence[str],
    scores: Sequence[Score],
    action: Action,
    sketcher: Sketcher,
    n_strange_turns: int = 0,
) -> Asked:
    """``texts`` are what the caller wrote since its last request, ``action`` what is done.

    The record names the detector that came nearest to its threshold, or the surest above it.
    """
    own = [score for score in scores if score.role is not Role.TOOL]
    top = max(own, key=_nearness, default=None)
    acted = top is not None and top.flagged and action != "allow"
    text = "\n".join(texts)
    prompt = Prompt(
        time=now,
        account=key_account(sender.key_id),
        sketch=sketcher.sketch(text),
        variant=_hashed(text),
        suspicion=0.0 if top is None else suspicion(top.score, top.threshold),
        blocked=acted and action in ("redact", "block"),
    )
    return Asked(
        prompt=prompt,
        request_id=request_id,
        user=sender.user,
        flagged=acted,
        detector=None if top is None else top.detector,
        score=None if top is None else top.score,
        threshold=None if top is None else top.threshold,
        n_strange_turns=n_strange_turns,
    )


def _nearness(score: Score) -> tuple[bool, float, float]:
    return score.flagged, suspicion(score.score, score.threshold), score.score


def _hashed(text: str) -> int:
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
