"""Follows a conversation over its requests, so that a crescendo of harmless turns is seen.

    conversations = Conversations(policy.conversation)
    place = conversations.follow(key_id, messages)      # known turns are not counted again
    state = advance(place.state, suspicions, settings)  # one mapping a new user turn
    conversations.keep(place, state)
    crescendo(state, settings)                          # 0..1, at 0.5 it is one

A conversation has no name on this API: each request sends all of it again. Its state is found
by the hash of the messages before the new ones, with the key's id, so that a client need not
say anything and cannot take another's state. A conversation whose history was rewritten is a
new one, and then every turn of it is counted: what the client shows is what is judged.

Evidence of each detector is a leaky sum over user turns: how near the turn came to the
threshold (0 to 1), less ``drift``, fading by ``decay`` a turn, never below zero (a CUSUM, Page
1954). A run of rising turns counts for more. A refused turn leaves evidence for those that come
instead of it. ``advance`` is pure: the state after many turns at once is the state after one by
one.

Not seen here: a client that leaves out earlier turns, and topics that no detector knows.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from msgspec import Meta

from fortpoint.types import Message, Role

DETECTOR = "crescendo"
THRESHOLD = 0.5

_DIGEST_BYTES = 16
_REFUSED = 0.25
_MOST_REFUSED = 3


class ConversationPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How turns add up."""

    enabled: Annotated[bool, Meta(description="Follow conversations.")] = True
    decay: Annotated[
        float, Meta(ge=0, le=1, description="What is left of the evidence a turn later.")
    ] = 0.9
    drift: Annotated[
        float, Meta(ge=0, le=1, description="Suspicion of a turn that is taken for usual.")
    ] = 0.3
    rising: Annotated[
        float, Meta(ge=0, le=10, description="Added where the last three turns rose.")
    ] = 0.25
    bound: Annotated[float, Meta(gt=0, le=1000, description="Evidence that makes a crescendo.")] = (
        1.0
    )
    most: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Conversations that are remembered.")
    ] = 20_000
    most_per_key: Annotated[int, Meta(ge=1, le=1_000_000, description="Of one key.")] = 2_000
    ttl_s: Annotated[
        float, Meta(gt=0, le=30 * 86_400, description="Forgotten when not met for so long.")
    ] = 21_600.0


@dataclass(frozen=True)
class Trail:
    """One detector's evidence, and its last turns' suspicions, the newest last."""

    evidence: float = 0.0
    last: tuple[float, ...] = ()


@dataclass(frozen=True)
class State:
    """What is known of a conversation. ``refused`` counts continuations that were blocked."""

    turns: int = 0
    trails: tuple[tuple[str, Trail], ...] = ()
    refused: int = 0


@dataclass(frozen=True)
class Place:
    """Where a request stands: the state before its new messages, and where its own goes.

    ``n_known`` messages were met before, as the start of an earlier request.
    """

    key_id: str
    state: State
    n_known: int
    before: bytes | None
    after: bytes


def advance(
    state: State, turns: Iterable[Mapping[str, float]], settings: ConversationPolicy
) -> State:
    """The state after these user turns; each maps detectors to suspicions in 0..1."""
    for turn in turns:
        trails = dict(state.trails)
        again = _REFUSED * min(state.refused, _MOST_REFUSED)
        for name, value in turn.items():
            trails[name] = _advance(trails.get(name, Trail()), value, again, settings)
        state = State(state.turns + 1, tuple(sorted(trails.items(), key=_name)))
    return state


def crescendo(state: State, settings: ConversationPolicy) -> float:
    """In 0..1: 0.5 at the bound, 0.75 at twice of it. One turn alone is no crescendo."""
    if state.turns < 2:
        return 0.0
    most = max((trail.evidence for _, trail in state.trails), default=0.0)
    return float(1.0 - 2.0 ** (-most / settings.bound))


def strange_turns(place: Place, messages: Sequence[Message]) -> int:
    """Turns of the assistant that this server did not have: shots of a made-up dialogue.

    One new answer is what every next request brings.
    """
    shown = sum(message.role is Role.ASSISTANT for message in messages[place.n_known :])
    told = max(_told(message.content) for message in messages) if messages else 0
    return max(shown - (1 if place.n_known else 0), told)


class Conversations:
    """States by prefix, least recently met first to go. One for each process."""

    def __init__(self, settings: ConversationPolicy) -> None:
        self._settings = settings
        self._states: OrderedDict[bytes, tuple[State, float, str]] = OrderedDict()
        self._of_key: dict[str, OrderedDict[bytes, None]] = {}
        self._secret = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._states)

    def follow(self, key_id: str, messages: Sequence[Message], now: float) -> Place:
        """The longest known start of these messages that is not all of them."""
        prefixes = self._prefixes(key_id, messages)
        for n_known in range(len(messages) - 1, 0, -1):
            found = self._states.get(prefixes[n_known])
            if found is not None and now - found[1] <= self._settings.ttl_s:
                self._meet(prefixes[n_known], key_id)
                return Place(key_id, found[0], n_known, prefixes[n_known], prefixes[-1])
        return Place(key_id, State(), 0, None, prefixes[-1])

    def keep(self, place: Place, state: State, now: float) -> None:
        """The state after this request's messages."""
        self._put(place.after, state, now, place.key_id)

    def refuse(self, place: Place, now: float) -> None:
        """The request was refused: what comes in its place starts with evidence."""
        if place.before is not None:
            refused = min(place.state.refused + 1, _MOST_REFUSED)
            self._put(place.before, replace(place.state, refused=refused), now, place.key_id)

    def _prefixes(self, key_id: str, messages: Sequence[Message]) -> list[bytes]:
        """Hashes of the first 0, 1, ... messages; lengths keep their borders apart."""
        running = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=self._secret)
        running.update(key_id.encode())
        found = [running.digest()]
        for message in messages:
            content = message.content.encode("utf-8", "surrogatepass")
            running.update(b"%s %d " % (message.role.value.encode(), len(content)))
            running.update(content)
            found.append(running.digest())
        return found

    def _meet(self, name: bytes, key_id: str) -> None:
        self._states.move_to_end(name)
        self._of_key[key_id].move_to_end(name)

    def _put(self, name: bytes, state: State, now: float, key_id: str) -> None:
        self._states[name] = (state, now, key_id)
        own = self._of_key.setdefault(key_id, OrderedDict())
        own[name] = None
        self._meet(name, key_id)
        if len(own) > self._settings.most_per_key:
            self._forget(next(iter(own)))
        if len(self._states) > self._settings.most:
            self._forget(next(iter(self._states)))

    def _forget(self, name: bytes) -> None:
        _, _, key_id = self._states.pop(name)
        own = self._of_key[key_id]
        del own[name]
        if not own:
            del self._of_key[key_id]


def _advance(trail: Trail, value: float, again: float, settings: ConversationPolicy) -> Trail:
    last = (*trail.last, value)[-3:]
    rose = len(last) == 3 and last[0] < last[1] < last[2]
    gained = value - settings.drift + (settings.rising if rose else 0.0)
    if value > 0:
        gained += again
    return Trail(max(0.0, settings.decay * trail.evidence + gained), last)


def _told(text: str) -> int:
    """Turns of a dialogue that is told within one text."""
    if len(text) < 256:
        return 0
    lower = text.lower()
    return max(lower.count("\nassistant:"), lower.count("\nai:"), lower.count("\na:"))


def _name(trail: tuple[str, Trail]) -> str:
    return trail[0]
