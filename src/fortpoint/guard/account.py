"""The risk of one account: a pure function of its events, which decays.

    account = Account().after(Event(now, "blocked", 0.8, "req_1"), settings)
    risk(account.events_so_far, now, settings)      # what it adds up to, were all events kept
    standing(account, now, settings)                # "active", "slowed", "review", "suspended"

An event's weight halves with every ``half_life_s``. So the state is one number and a moment:
adding to it as events come gives what the sum over all of them would (a test holds this).
Copying the model (extraction) is no event but a level, of volume, novelty and asking for
log-probabilities; one busy day of an honest account and one of a copier differ in degree only,
so it asks for review and never suspends.

Weights, in units of one surely blocked attack:

    blocked           0.5 at the threshold, 1 well above it; a quarter for other words of the same
    flagged           0.25
    near_duplicate    up to 0.5: passed, but nearly the same as what was blocked before
    resampling        up to 1: one of many edits of a suspicious prompt in a short time
    many_shot         up to 2: many turns of a dialogue that this server did not have
    split_attack      2: parts that together are a known attack
    linked            a share of another account's event; see ``collusion.py``

Not protected here: an attacker with a new account for every few queries, unless they send
nearly the same (``attack_families.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

EventKind = Literal[
    "blocked", "flagged", "near_duplicate", "resampling", "many_shot", "split_attack", "linked"
]
Standing = Literal["active", "slowed", "review", "suspended"]

MAX_RISK = 1e6
_DAY_S = 86_400.0
_REGISTERS = 256
_RANK_BITS = 56
_COUNTED = 8  # hashes of each sketch: a sample that equal texts share
_MIX = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

Positive = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]


class AccountPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What follows from an account's risk. A bound of 0 never acts."""

    enabled: Annotated[bool, Meta(description="Keep a risk for each key and user.")] = True
    shadow: Annotated[bool, Meta(description="Record what would follow; refuse nobody for it.")] = (
        False
    )
    half_life_s: Annotated[Positive, Meta(description="An event's weight halves in so long.")] = (
        43_200.0
    )
    slow_at: Annotated[
        float, Meta(ge=0, le=MAX_RISK, description="Risk from which a request has to wait (429).")
    ] = 5.0
    review_at: Annotated[
        float,
        Meta(ge=0, le=MAX_RISK, description="Risk from which an operator must look first (403)."),
    ] = 0.0
    suspend_at: Annotated[
        float, Meta(ge=0, le=MAX_RISK, description="Risk from which the account is closed (403).")
    ] = 12.0
    slow_interval_s: Annotated[
        float, Meta(gt=0, le=86_400, description="A slowed account may ask once in so long.")
    ] = 30.0
    user_factor: Annotated[
        float, Meta(ge=1, le=1000, description="A user's bounds are so many times a key's.")
    ] = 1.5
    link_share: Annotated[
        Share, Meta(description="Share of an event that accounts linked with its own get.")
    ] = 0.5
    extraction_per_day: Annotated[
        Positive,
        Meta(
            description="Requests a day, all new, from which an operator must look first; half "
            "as many where all ask for log-probabilities."
        ),
    ] = 20_000.0


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that raised a risk, without any of its text.

    ``family`` names the group of nearly equal prompts that it belongs to; ``others`` are the
    accounts that it concerns too.
    """

    time: float
    kind: EventKind
    weight: float
    request_id: str
    detector: str | None = None
    score: float | None = None
    family: str | None = None
    others: tuple[str, ...] = ()


Counted = tuple[tuple[int, int], ...]
"""Registers of a HyperLogLog and what they become at least."""


class Volume(msgspec.Struct, frozen=True):
    """How much was asked lately, how often for log-probabilities, and how much of it was new.

    ``registers`` is a HyperLogLog (Flajolet et al. 2007) of each sketch's smallest hashes,
    ``values`` how many there were; both start anew when they are a day old.
    """

    at: float = 0.0
    since: float = 0.0
    requests: float = 0.0
    logprobs: float = 0.0
    values: int = 0
    registers: bytes = bytes(_REGISTERS)

    def after(self, now: float, counted: Counted, *, logprobs: bool) -> Volume:
        fade = _fade(now - self.at, _DAY_S)
        renewed = now - self.since > _DAY_S
        return Volume(
            at=max(now, self.at),
            since=now if renewed else self.since,
            requests=self.requests * fade + 1.0,
            logprobs=self.logprobs * fade + (1.0 if logprobs else 0.0),
            values=len(counted) + (0 if renewed else self.values),
            registers=_registered(bytes(_REGISTERS) if renewed else self.registers, counted),
        )

    def novelty(self) -> float:
        """Share of words and word pairs that had not come before, in 0..1."""
        if not self.values:
            return 0.0
        return min(1.0, _cardinality(self.registers) / self.values)


class Account(msgspec.Struct, frozen=True):
    """All that is kept of one key or user to judge it: ``level`` as it was at ``at``."""

    level: float = 0.0
    at: float = 0.0
    volume: Volume = Volume()

    def after(self, event: Event, settings: AccountPolicy) -> Account:
        """The account with ``event`` added. Events may come out of order."""
        now = max(self.at, event.time)
        level = self.risk(now, settings) + _faded(event, now, settings.half_life_s)
        return msgspec.structs.replace(self, level=min(level, MAX_RISK), at=now)

    def asked(self, now: float, counted: Counted, *, logprobs: bool) -> Account:
        """The account with one more request, whatever it was."""
        return Account(self.level, self.at, self.volume.after(now, counted, logprobs=logprobs))

    def risk(self, now: float, settings: AccountPolicy) -> float:
        return self.level * _fade(now - self.at, settings.half_life_s)

    def extraction(self, now: float, settings: AccountPolicy) -> float:
        """0 and up; at 1 an operator must look first.

        In steady state a day's requests are ``requests * ln 2``, for the count halves each day.
        """
        most = self.most_extraction(now, settings)
        return most * self.volume.novelty() if most else 0.0

    def most_extraction(self, now: float, settings: AccountPolicy) -> float:
        """The same as if all had been new; far cheaper."""
        volume = self.volume
        if not volume.requests:
            return 0.0
        per_day = volume.requests * _fade(now - volume.at, _DAY_S) * math.log(2)
        asked_logprobs = min(1.0, volume.logprobs / volume.requests)
        return per_day / settings.extraction_per_day * (1.0 + asked_logprobs)


def risk(events: Iterable[Event], now: float, settings: AccountPolicy) -> float:
    """The sum of the events' weights as they are at ``now``."""
    return math.fsum(_faded(event, now, settings.half_life_s) for event in events)


def standing(
    account: Account, now: float, settings: AccountPolicy, *, factor: float = 1.0
) -> Standing:
    """What the account's state asks for; the gravest that it has reached.

    ``factor`` widens the bounds (a user has several keys). Suspension and review last until an
    operator ends them, which is not this function's business.
    """
    level = account.risk(now, settings) / factor
    if not math.isfinite(level) or _reached(level, settings.suspend_at):
        return "suspended"
    if _copies(account, now, settings, factor) or _reached(level, settings.review_at):
        return "review"
    return "slowed" if _reached(level, settings.slow_at) else "active"


def counted(sketch: tuple[int, ...]) -> Counted:
    """What a sketch's smallest hashes do to a HyperLogLog."""
    found = []
    for value in sketch[:_COUNTED]:
        # The smallest hashes of a set are not spread evenly any more; mixed again they are.
        mixed = value * _MIX & _MASK
        rank = _RANK_BITS + 1 - (mixed & (1 << _RANK_BITS) - 1).bit_length()
        found.append((mixed >> _RANK_BITS, rank))
    return tuple(found)


def blocked_weight(score: float, threshold: float) -> float:
    """0.5 at the threshold, 1 from two logits above it: most false alarms lie just above."""
    return 0.5 + 0.5 * min(1.0, max(0.0, (logit(score) - logit(threshold)) / 2.0))


def many_shot_weight(n_turns: int) -> float:
    """For a dialogue of so many turns that we never had: 0 below 32, at most 2 (from 128)."""
    return 0.0 if n_turns < 32 else min(2.0, n_turns / 64.0)


def logit(probability: float) -> float:
    """Log-odds, of a probability kept away from 0 and 1."""
    inside = min(max(probability, 1e-6), 1.0 - 1e-6)
    return math.log(inside / (1.0 - inside))


def suspicion(score: float, threshold: float) -> float:
    """How near a detector came to its threshold: 1 at it, 0 from two logits below."""
    if not (math.isfinite(score) and math.isfinite(threshold)):
        return 1.0
    if score >= threshold:
        return 1.0
    return max(0.0, 1.0 + (logit(score) - logit(threshold)) / 2.0)


def _copies(account: Account, now: float, settings: AccountPolicy, factor: float) -> bool:
    most = account.most_extraction(now, settings) / factor
    if most < 1.0:
        return False
    return not account.extraction(now, settings) / factor < 1.0


def _registered(registers: bytes, counted: Counted) -> bytes:
    higher = [(place, rank) for place, rank in counted if rank > registers[place]]
    if not higher:
        return registers
    changed = bytearray(registers)
    for place, rank in higher:
        changed[place] = max(changed[place], rank)
    return bytes(changed)


def _faded(event: Event, now: float, half_life_s: float) -> float:
    return event.weight * _fade(now - event.time, half_life_s)


def _fade(passed_s: float, half_life_s: float) -> float:
    return float(2.0 ** (-max(0.0, passed_s) / half_life_s))


def _reached(level: float, bound: float) -> bool:
    return bound > 0 and level >= bound


def _cardinality(registers: bytes) -> float:
    """HyperLogLog's estimate, with linear counting while registers are empty."""
    empty = registers.count(0)
    alpha = 0.7213 / (1 + 1.079 / _REGISTERS)
    raw = alpha * _REGISTERS**2 / math.fsum(2.0**-rank for rank in registers)
    if raw <= 2.5 * _REGISTERS and empty:
        return _REGISTERS * math.log(_REGISTERS / empty)
    return raw
