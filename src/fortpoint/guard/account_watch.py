"""All accounts in memory: takes in judged prompts, says which bounds were reached.

    watch = AccountWatch(policy.account)
    observed = watch.observe(asked, logprobs=False, attempt=True)
    observed.events                  # account -> its events, to be kept as evidence
    observed.reached                 # account -> the standing that it has come to

An account is a key (``key:abc``) or a user (``user:ada``). Nothing here does I/O or knows what
time it is; ``account_desk.py`` keeps it all on disk and acts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fortpoint.guard.account import Account, AccountPolicy, Event, Standing, counted, standing
from fortpoint.guard.attack_families import AttackFamilies, Joined
from fortpoint.guard.collusion import Asked, events_of, shared

MAX_ACCOUNTS = 20_000
_GRAVITY: dict[Standing, int] = {"active": 0, "slowed": 1, "review": 2, "suspended": 3}
_CALM = 0.8  # a slowed account is active again from so much of the bound


def key_account(key_id: str) -> str:
    return f"key:{key_id}"


def user_account(user: str) -> str:
    return f"user:{user}"


def graver(one: Standing, other: Standing) -> bool:
    """Whether ``one`` is graver than ``other``."""
    return _GRAVITY[one] > _GRAVITY[other]


@dataclass
class Watched:
    """One account. ``pending`` are events that are not on disk yet; ``generation`` counts an
    operator's changes, so that a change elsewhere is noticed. ``loaded``: what is on disk is in
    ``account`` too."""

    account: Account = field(default_factory=Account)
    status: Standing = "active"
    generation: int = 0
    pending: list[Event] = field(default_factory=list)
    asked_at: float = -math.inf
    changed: bool = False
    loaded: bool = False


@dataclass(frozen=True)
class Link:
    """Two accounts that attack with the same family of prompts."""

    account: str
    other: str
    family: str


@dataclass(frozen=True)
class Observed:
    """What one prompt led to."""

    joined: Joined | None
    events: dict[str, tuple[Event, ...]]
    links: tuple[Link, ...]
    reached: dict[str, Standing]


class AccountWatch:
    """For one process. The accounts that were not met for longest go, once they are on disk."""

    def __init__(self, settings: AccountPolicy, most: int = MAX_ACCOUNTS) -> None:
        self.settings = settings
        self.families = AttackFamilies()
        self._most = most
        self._accounts: OrderedDict[str, Watched] = OrderedDict()
        self._users: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, account: str) -> Watched:
        """Made if missing."""
        watched = self._accounts.setdefault(account, Watched())
        self._accounts.move_to_end(account)
        if len(self._accounts) > self._most:
            self._make_place()
        return watched

    def replace(self, account: str, kept: Account) -> None:
        """Take what is on disk, and add what is not there yet."""
        watched = self.of(account)
        for event in watched.pending:
            kept = kept.after(event, self.settings)
        watched.account, watched.loaded = kept, True

    def waiting(self) -> Iterator[tuple[str, Watched]]:
        """Accounts with something that is not on disk."""
        for name, watched in self._accounts.items():
            if watched.pending or watched.changed:
                yield name, watched

    def risk(self, account: str, now: float) -> float:
        return self.of(account).account.risk(now, self.settings)

    def standing(self, account: str, now: float) -> Standing:
        """What its state asks for now, whatever its status is."""
        return standing(self.of(account).account, now, self.settings, factor=self._factor(account))

    def is_calm(self, account: str, now: float) -> bool:
        """Whether an account that was slowed is well below the bound again."""
        bound = self.settings.slow_at * self._factor(account)
        return self.risk(account, now) < _CALM * bound or not self.settings.slow_at

    def wait_s(self, account: str, now: float) -> float:
        """How long a slowed account has to wait for its next request; 0 if not at all."""
        return max(0.0, self.of(account).asked_at + self.settings.slow_interval_s - now)

    def observe(self, asked: Asked, *, logprobs: bool, attempt: bool) -> Observed:
        """Take a judged prompt in. Without ``attempt`` (it was only scored, not to be answered)
        it counts for its family and raises no risk."""
        prompt = asked.prompt
        user = user_account(asked.user)
        self._users[prompt.account] = user
        self._users.move_to_end(prompt.account)
        if len(self._users) > self._most:
            self._users.popitem(last=False)
        joined = self.families.join(prompt)
        seen = counted(prompt.sketch)
        for account in (prompt.account, user):
            watched = self.of(account)
            watched.account = watched.account.asked(prompt.time, seen, logprobs=logprobs)
            watched.changed = True
        own = events_of(asked, joined) if attempt else ()
        given = self._given(prompt.account, user, own)
        for account, events in given.items():
            self._add(account, events)
        return Observed(
            joined, given, _links(prompt.account, own), self._reached(given, prompt.time)
        )

    def _given(
        self, sender: str, user: str, own: tuple[Event, ...]
    ) -> dict[str, tuple[Event, ...]]:
        """Who gets which events: the sender and its user all, linked accounts a share."""
        if not own:
            return {sender: (), user: ()}
        given = {sender: own, user: own}
        partners = dict.fromkeys(other for event in own for other in event.others)
        for partner in partners:
            for account in (partner, self._users.get(partner)):
                if account is not None and account not in given:
                    given[account] = shared(own, sender, self.settings)
        return given

    def _add(self, account: str, events: tuple[Event, ...]) -> None:
        watched = self.of(account)
        for event in events:
            watched.account = watched.account.after(event, self.settings)
            watched.pending.append(event)

    def _reached(self, given: dict[str, tuple[Event, ...]], now: float) -> dict[str, Standing]:
        found = {account: self.standing(account, now) for account in given}
        return {
            account: reached
            for account, reached in found.items()
            if graver(reached, self.of(account).status)
        }

    def _factor(self, account: str) -> float:
        return self.settings.user_factor if account.startswith("user:") else 1.0

    def _make_place(self) -> None:
        for name, watched in self._accounts.items():
            if not watched.pending:
                del self._accounts[name]
                return


def _links(sender: str, events: tuple[Event, ...]) -> tuple[Link, ...]:
    found = {
        Link(min(sender, other), max(sender, other), event.family)
        for event in events
        if event.family is not None
        for other in event.others
    }
    return tuple(sorted(found, key=lambda link: (link.account, link.other, link.family)))
