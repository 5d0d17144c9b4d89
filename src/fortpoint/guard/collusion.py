"""From one judged prompt to the events of every account that it concerns.

    found = events_of(asked, joined, settings)      # account -> its events, for one prompt

The sender's key gets the events; its user gets the same ones. Accounts that attack with the
same family of prompts, or whose parts together make one attack, are linked: each gets a share
of what the others do, with the family as evidence. A share is not passed on again, and an
account is linked only by suspicious prompts of its own: nobody is blamed for what a stranger
copied from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fortpoint.guard.account import (
    AccountPolicy,
    Event,
    EventKind,
    blocked_weight,
    many_shot_weight,
)
from fortpoint.guard.attack_families import Joined, Prompt

_AGAIN = 0.25  # of what was refused just now, in other words: most who do that are honest
_FREE_EDITS = 4.0
_NEAR = 0.5
_TEMPLATE = 0.25  # families that are less suspicious than this are a template, not an attack
_FLAGGED = 0.25
_MOST = 0.5
_SPLIT = 2.0


@dataclass(frozen=True)
class Asked:
    """A prompt as it was judged, and by whose key and of which user it came.

    ``n_strange_turns`` are the turns of its dialogue that this server did not have.
    """

    prompt: Prompt
    request_id: str
    user: str
    flagged: bool
    detector: str | None
    score: float | None
    threshold: float | None
    n_strange_turns: int = 0


def events_of(asked: Asked, joined: Joined | None) -> tuple[Event, ...]:
    """What the sender's account gets for this prompt."""
    return tuple(event for event in _events(asked, joined) if event.weight > 0)


def shared(events: tuple[Event, ...], sender: str, settings: AccountPolicy) -> tuple[Event, ...]:
    """What each linked account gets for the sender's events: one event of their share."""
    weight = settings.link_share * sum(event.weight for event in events)
    if not events or weight <= 0:
        return ()
    first = events[0]
    return (
        Event(
            time=first.time,
            kind="linked",
            weight=weight,
            request_id=first.request_id,
            detector=first.detector,
            score=first.score,
            family=next((event.family for event in events if event.family), None),
            others=(sender,),
        ),
    )


def _events(asked: Asked, joined: Joined | None) -> Iterator[Event]:
    prompt = asked.prompt
    if prompt.blocked:
        score = 1.0 if asked.score is None else asked.score
        threshold = 0.5 if asked.threshold is None else asked.threshold
        again = joined is not None and joined.repeated
        yield _event(
            asked, joined, "blocked", blocked_weight(score, threshold) * (_AGAIN if again else 1.0)
        )
    elif asked.flagged:
        yield _event(asked, joined, "flagged", _FLAGGED)
    yield _event(asked, joined, "many_shot", many_shot_weight(asked.n_strange_turns))
    if joined is None:
        return
    if joined.completes:
        yield _event(asked, joined, "split_attack", _SPLIT)
    surely = max(0.0, (joined.suspicion - _TEMPLATE) / (1.0 - _TEMPLATE))
    near = joined.known and joined.edited and joined.similarity >= _NEAR
    if near and not prompt.blocked:
        yield _event(asked, joined, "near_duplicate", _MOST * surely)
    if joined.edited and joined.rate > _FREE_EDITS:
        haste = min(1.0, (joined.rate - _FREE_EDITS) / _FREE_EDITS)
        yield _event(asked, joined, "resampling", surely * haste)


def _event(asked: Asked, joined: Joined | None, kind: EventKind, weight: float) -> Event:
    return Event(
        time=asked.prompt.time,
        kind=kind,
        weight=weight,
        request_id=asked.request_id,
        detector=asked.detector,
        score=asked.score,
        family=None if joined is None else joined.family,
        others=() if joined is None else joined.partners,
    )
