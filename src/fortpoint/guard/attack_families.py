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
    NearDuplicates,
    Sketch,
    containment,
    coverage,
)

MAX_FAMILIES = 8192
MAX_MEMBERS = 16
_MAX_VARIANTS = 512
_SIMILAR = 0.3
_PART = 0.7
_WHOLE = 0.75
_MIN_PART_VALUES = 8
_RATE_HALF_LIFE_S = 900.0
_ATTACKS = 1.0  # suspicion of its own members that makes an account one of the attackers
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
    """What one account sent of a family."""

    suspicion: float = 0.0
    parts: int = 0


@dataclass
class Family:
    """``rate`` counts variants; it halves every fifteen minutes."""

    sketch: Sketch
    n: float = 0.0
    suspicion: float = 0.0
    blocked: int = 0
    rate: float = 0.0
    rate_at: float = 0.0
    members: OrderedDict[str, Member] = field(default_factory=OrderedDict)
    variants: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def mean(self) -> float:
        return self.suspicion / self.n if self.n else 0.0

    def attackers(self) -> Iterator[str]:
        for account, member in self.members.items():
            if member.suspicion >= _ATTACKS:
                yield account

    def member(self, account: str) -> Member:
        """Made if missing; the one that was not met for longest makes place."""
        member = self.members.setdefault(account, Member())
        self.members.move_to_end(account)
        if len(self.members) > MAX_MEMBERS:
            self.members.popitem(last=False)
        return member


@dataclass(frozen=True)
class Joined:
    """A prompt in its family. ``known``: a nearly equal one was blocked before this one.

    ``rate`` is how many different variants came lately, ``edited`` whether this is a new one.
    ``partners`` are further accounts that attack with it. ``completes`` names the accounts
    whose parts, with this one, make up the whole.
    """

    family: str
    suspicion: float
    rate: float
    known: bool
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
        if match is not None:
            return self._joined(match.name, prompt)
        if (part := self._part(prompt)) is not None:
            return part
        if prompt.suspicion <= 0:
            return None
        name = "fam_" + secrets.token_hex(8)
        self._add(name, Family(prompt.sketch, rate_at=prompt.time))
        return self._joined(name, prompt)

    def _add(self, name: str, family: Family) -> None:
        self._families[name] = family
        gone = self._near.add(name, family.sketch)
        if gone is not None:
            del self._families[gone]

    def _joined(self, name: str, prompt: Prompt) -> Joined:
        family = self._families[name]
        self._near.use(name)
        known = family.blocked > 0
        edited = self._count(family, prompt)
        others = tuple(one for one in family.attackers() if one != prompt.account)
        attacks = family.members[prompt.account].suspicion >= _ATTACKS
        return Joined(
            name, family.mean, family.rate, known, edited, partners=others if attacks else ()
        )

    def _count(self, family: Family, prompt: Prompt) -> bool:
        """Add the prompt; whether it is another edit than those before."""
        edited = bool(family.n) and prompt.variant not in family.variants
        family.variants[prompt.variant] = None
        if len(family.variants) > _MAX_VARIANTS:
            family.variants.popitem(last=False)
        fade = 2.0 ** (-max(0.0, prompt.time - family.rate_at) / _RATE_HALF_LIFE_S)
        family.rate = family.rate * fade + (1.0 if edited else 0.0)
        family.rate_at = max(family.rate_at, prompt.time)
        family.n += 1.0
        family.suspicion += prompt.suspicion
        family.blocked += prompt.blocked
        family.member(prompt.account).suspicion += prompt.suspicion
        if family.n > _MOST_COUNTED:  # what was long ago counts for less
            family.n /= 2
            family.suspicion /= 2
        return edited

    def _part(self, prompt: Prompt) -> Joined | None:
        """The prompt as a piece of an attack that was blocked before."""
        if len(prompt.sketch) < _MIN_PART_VALUES:
            return None
        for name in self._near.near(prompt.sketch):
            family = self._families[name]
            if family.blocked and containment(prompt.sketch, family.sketch) >= _PART:
                return self._pieced(name, family, prompt)
        return None

    def _pieced(self, name: str, family: Family, prompt: Prompt) -> Joined | None:
        own = family.member(prompt.account)
        new = coverage(prompt.sketch, family.sketch) & ~own.parts
        own.parts |= new
        together = 0
        for member in family.members.values():
            together |= member.parts
        whole = _WHOLE * len(family.sketch)
        if not new or together.bit_count() < whole:
            return None
        senders = tuple(one for one, member in family.members.items() if member.parts)
        for member in family.members.values():
            member.parts = 0  # the next whole is counted anew
        return Joined(
            name,
            family.mean,
            family.rate,
            known=True,
            edited=True,
            partners=tuple(one for one in senders if one != prompt.account),
            completes=senders,
        )
