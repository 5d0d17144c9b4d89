"""Groups of nearly equal suspicious prompts, over all accounts: who sent how many, how fast.

    families = AttackFamilies()
    seen = families.join(prompt)                 # in a family, a new one, or None
    seen.suspicion, seen.rate, seen.known        # of the whole family, whoever sent it
    seen.partners                                # other accounts that attack with it

A family begins with a prompt that came near a detector's threshold. Whatever is nearly the
same joins it, however harmless it scores: its share of suspicious members tells an attack that
was edited until it passed from a harmless template that was flagged once. Parts of a family
that was blocked before are noted too, account by account, so that an attack sent in pieces is
seen when the pieces add up.

Families are bounded in number, members and variants; the ones that are not met again go.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fortpoint.guard.near_duplicates import (
    MIN_VALUES,
    Match,
    NearDuplicates,
    Sketch,
    containment,
    coverage,
)

MAX_FAMILIES = 8192
MAX_MEMBERS = 16
_MAX_VARIANTS = 512
_SIMILAR = 0.3
_ALL = 0.8  # from so near on it is the attack itself and no piece of it
_PART = 0.85
_WHOLE = 0.85
_MIN_PART_VALUES = 8
_RATE_HALF_LIFE_S = 900.0
_ATTACKS = 2.0  # edits lately that make an account one of the attackers
_MOST_COUNTED = 512.0


@dataclass(frozen=True)
class Prompt:
    """What one request brings: hashes and numbers, no text.

    ``variant`` is a hash of the exact text. ``suspicion`` is 1 at a detector's threshold.
    """

    time: float
    account: str
    sketch: Sketch
    variant: int
    suspicion: float
    blocked: bool


@dataclass
class Member:
    """What one account sent of a family. ``rate`` counts its edits, each by how suspicious it
    is; it halves every fifteen minutes. ``parts`` has a bit for each hash of the family's."""

    rate: float = 0.0
    at: float = 0.0
    blocked: int = 0
    parts: int = 0

    def rate_at(self, now: float) -> float:
        return float(self.rate * 2.0 ** (-max(0.0, now - self.at) / _RATE_HALF_LIFE_S))


@dataclass
class Family:
    """``sketch`` is that of its first prompt, ``n`` and ``suspicion`` are of all of them."""

    sketch: Sketch
    n: float = 0.0
    suspicion: float = 0.0
    blocked: int = 0
    members: OrderedDict[str, Member] = field(default_factory=OrderedDict)
    variants: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def mean(self) -> float:
        return self.suspicion / self.n if self.n else 0.0

    def attackers(self, now: float) -> Iterator[tuple[str, float]]:
        """Accounts that attack with it lately, and their rates."""
        for account, member in self.members.items():
            if (rate := member.rate_at(now)) >= _ATTACKS:
                yield account, rate

    def member(self, account: str) -> Member:
        """Made if missing; the one that was not met for longest makes place."""
        member = self.members.setdefault(account, Member())
        self.members.move_to_end(account)
        if len(self.members) > MAX_MEMBERS:
            self.members.popitem(last=False)
        return member


@dataclass(frozen=True)
class Joined:
    """A prompt in its family, with the suspicion of all that is in it.

    ``similarity`` is to the family's first prompt. ``known``: a nearly equal one was blocked
    before this one; ``repeated``: one of this account. ``edited``: another variant than those
    before. ``rate`` is how many edits its account and those that attack beside it made lately.
    ``partners`` are these, ``completes`` the accounts whose parts, with this one, are a whole.
    """

    family: str
    similarity: float
    suspicion: float
    rate: float
    known: bool
    repeated: bool
    edited: bool
    partners: tuple[str, ...] = ()
    completes: tuple[str, ...] = ()


class AttackFamilies:
    """All families of one process."""

    def __init__(self, most: int = MAX_FAMILIES) -> None:
        self._near = NearDuplicates(most)
        self._families: dict[str, Family] = {}

    def __len__(self) -> int:
        return len(self._families)

    def __getitem__(self, name: str) -> Family:
        return self._families[name]

    def restore(self, name: str, family: Family) -> None:
        """A family that was kept over a restart."""
        self._add(name, family)

    def join(self, prompt: Prompt) -> Joined | None:
        """Put the prompt where it belongs; None where nothing is suspicious about it."""
        if len(prompt.sketch) < MIN_VALUES:
            return None
        match = self._near.nearest(prompt.sketch, _SIMILAR)
        completes = () if match and match.similarity >= _ALL else self._completed(prompt)
        if match is None:
            if not completes and prompt.suspicion <= 0:
                return None
            match = Match("fam_" + secrets.token_hex(8), 1.0)
            self._add(match.name, Family(prompt.sketch))
        return self._joined(match, prompt, completes)

    def _add(self, name: str, family: Family) -> None:
        self._families[name] = family
        gone = self._near.add(name, family.sketch)
        if gone is not None:
            del self._families[gone]

    def _joined(self, match: Match, prompt: Prompt, completes: tuple[str, ...]) -> Joined:
        family = self._families[match.name]
        self._near.use(match.name)
        own = family.member(prompt.account)
        known, repeated = family.blocked > 0, own.blocked > 0
        edited = _count(family, own, prompt)
        attackers = dict(family.attackers(prompt.time))
        rate = attackers.pop(prompt.account, 0.0)
        if rate:  # whoever attacks alone has no partners
            rate += sum(attackers.values())
        partners = {*(attackers if rate else ()), *completes} - {prompt.account}
        return Joined(
            family=match.name,
            similarity=match.similarity,
            suspicion=family.mean,
            rate=rate,
            known=known,
            repeated=repeated,
            edited=edited,
            partners=tuple(sorted(partners)),
            completes=completes,
        )

    def _completed(self, prompt: Prompt) -> tuple[str, ...]:
        """Who sent the pieces of an attack that was blocked before, once this is the last."""
        if len(prompt.sketch) < _MIN_PART_VALUES:
            return ()
        for name in self._near.near(prompt.sketch):
            family = self._families[name]
            if family.blocked and containment(prompt.sketch, family.sketch) >= _PART:
                return _pieced(family, prompt)
        return ()


def _count(family: Family, own: Member, prompt: Prompt) -> bool:
    """Add the prompt; whether it is another edit than those before."""
    edited = bool(family.n) and prompt.variant not in family.variants
    family.variants[prompt.variant] = None
    if len(family.variants) > _MAX_VARIANTS:
        family.variants.popitem(last=False)
    family.n += 1.0
    family.suspicion += prompt.suspicion
    family.blocked += prompt.blocked
    own.blocked += prompt.blocked
    if edited:  # an edit that scores harmless is what the attacker looks for
        own.rate = own.rate_at(prompt.time) + max(prompt.suspicion, family.mean)
        own.at = max(own.at, prompt.time)
    if family.n > _MOST_COUNTED:  # what was long ago counts for less
        family.n /= 2
        family.suspicion /= 2
    return edited


def _pieced(family: Family, prompt: Prompt) -> tuple[str, ...]:
    own = family.member(prompt.account)
    new = coverage(prompt.sketch, family.sketch) & ~own.parts
    own.parts |= new
    together = 0
    for member in family.members.values():
        together |= member.parts
    if not new or together.bit_count() < _WHOLE * len(family.sketch):
        return ()
    senders = tuple(one for one, member in family.members.items() if member.parts)
    for member in family.members.values():
        member.parts = 0  # the next whole is counted anew
    return senders
