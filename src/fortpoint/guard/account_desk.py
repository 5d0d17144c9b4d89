"""Keeps accounts on disk, lets a request in or not, and acts when a bound is reached.

    desk = await AccountDesk.open(ledger, audit, policy.account)
    await desk.admit(key_id, user)                  # AccountSuspended, AccountUnderReview, ...
    await desk.observe(asked, logprobs=False, attempt=True)

A consequence takes three steps in this order: it is in the audit log, it and its evidence are
in the database, then it acts. Where one of them fails, the request that led to it is refused.
Events that have no consequence yet are written every few seconds; a process that is killed
loses those.

Whoever runs Fort Point can end every consequence (``clear``, ``reinstate``), with the evidence
before them: request ids, scores, times and hashes. Operators' own keys are watched, and never
slowed or suspended: whoever may lift a suspension is not stopped by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from fortpoint.audit.entry import Entry, now
from fortpoint.errors import (
    AccountSlowed,
    AccountSuspended,
    AccountUnderReview,
    GuardFailed,
)
from fortpoint.guard.account import AccountPolicy, Standing
from fortpoint.guard.account_ledger import AccountLedger, Change
from fortpoint.guard.account_watch import (
    AccountWatch,
    Link,
    Observed,
    Watched,
    graver,
    key_account,
    user_account,
)
from fortpoint.guard.attack_families import Family
from fortpoint.guard.collusion import Asked
from fortpoint.guard.near_duplicates import Sketcher

_FLUSH_S = 5.0
_MOST_PENDING = 1024
_VOLUME_KEPT = 100  # requests lately from which an account's volume is kept over a restart


class Audit(Protocol):
    """Returns when the entry is on disk; raises ``AuditUnavailable``."""

    async def append(self, entry: Entry) -> object: ...


class AccountDesk:
    """All accounts, for one process and event loop. Use ``open``."""

    def __init__(
        self,
        ledger: AccountLedger,
        audit: Audit,
        settings: AccountPolicy,
        sketcher: Sketcher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.settings = settings
        self.sketcher = sketcher
        self._audit = audit
        self._clock = clock
        self._watch = AccountWatch(settings)
        self._links: dict[Link, None] = {}
        self._attacks: dict[str, Family] = {}
        self._would_be: dict[str, Standing] = {}
        self._acting = asyncio.Lock()
        self._flushed_at = clock()
        self._n_pending = 0

    @classmethod
    async def open(
        cls,
        ledger: AccountLedger,
        audit: Audit,
        settings: AccountPolicy,
        clock: Callable[[], float] = time.time,
    ) -> AccountDesk:
        """With the known attacks of this home. Raises ``StorageError``."""
        desk = cls(ledger, audit, settings, Sketcher(await ledger.sketch_key()), clock)
        for name, family in (await ledger.attacks()).items():
            desk._watch.families.restore(name, family)
        return desk

    async def admit(self, key_id: str, user: str) -> None:
        """Let the request of a customer go on, or raise ``AccountSuspended``,
        ``AccountUnderReview``, ``AccountSlowed`` or ``StorageError``."""
        accounts = (key_account(key_id), user_account(user))
        waits = [await self._admitted(account) for account in accounts]
        if (wait_s := max(waits)) > 0:
            raise AccountSlowed(
                f"this account is slowed down; try again in {wait_s:.0f} seconds",
                retry_after_s=wait_s,
            )
        for account in accounts:
            self._watch.of(account).asked_at = self._clock()

    async def observe(self, asked: Asked, *, logprobs: bool, attempt: bool, exempt: bool) -> None:
        """Take a judged prompt in, and act where it reached a bound.

        Raises ``AccountSuspended`` and ``AccountUnderReview`` where it did, ``GuardFailed``
        where it cannot be judged, ``AuditUnavailable`` and ``StorageError``.
        """
        try:
            observed = self._watch.observe(asked, logprobs=logprobs, attempt=attempt)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            raise GuardFailed(
                "the account's risk could not be judged, so the request was not answered; try again"
            ) from None
        self._note(observed)
        sender = (asked.prompt.account, user_account(asked.user))
        reached = {
            account: standing
            for account, standing in observed.reached.items()
            if not (exempt and account in sender)
        }
        if reached:
            await self._act(reached, asked.request_id)
        elif self._is_due():
            await self.flush()
        if reached and not exempt:
            for account in sender:
                self._refuse(self._watch.of(account).status)

    def risk(self, account: str) -> float:
        """As it is in this process now."""
        return self._watch.risk(account, self._clock())

    async def flush(self) -> None:
        """Write all that waits. Raises ``StorageError``."""
        async with self._acting:
            await self._write(dict(self._watch.waiting()))

    async def _admitted(self, account: str) -> float:
        """How long it has to wait."""
        watched = await self._current(account)
        if self.settings.shadow:
            return 0.0
        self._refuse(watched.status)
        if watched.status != "slowed":
            return 0.0
        if self._watch.is_calm(account, self._clock()):
            await self._calm(account, watched)
            return 0.0
        return self._watch.wait_s(account, self._clock())

    async def _current(self, account: str) -> Watched:
        """The account with what operators and other processes made of it."""
        found = await self.ledger.status(account)
        watched = self._watch.of(account)
        known = watched.loaded and found == (watched.status, watched.generation)
        if found is not None and not known:
            async with self._acting:
                await self._load(account)
        return watched

    async def _load(self, account: str) -> None:
        """From the disk, and with what is not there yet. Nothing may be on its way there."""
        watched = self._watch.of(account)
        if (row := await self.ledger.row(account)) is None:
            return
        if row.generation != watched.generation:
            watched.pending.clear()  # of a state that an operator has ended
        watched.status, watched.generation = row.status, row.generation
        self._watch.replace(account, row.state)

    def _refuse(self, status: Standing) -> None:
        if self.settings.shadow:
            return
        if status == "suspended":
            raise AccountSuspended(
                "this account is suspended for repeated attacks; its operator has the evidence "
                "and can reinstate it"
            )
        if status == "review":
            raise AccountUnderReview(
                "this account waits for its operator to review its use; ask them to"
            )

    def _note(self, observed: Observed) -> None:
        self._n_pending += sum(len(events) for events in observed.events.values())
        self._links.update(dict.fromkeys(observed.links))
        joined = observed.joined
        if joined is not None and self._watch.families[joined.family].blocked:
            self._attacks[joined.family] = self._watch.families[joined.family]

    def _is_due(self) -> bool:
        return self._n_pending > _MOST_PENDING or (
            self._clock() - self._flushed_at > _FLUSH_S
            and bool(self._n_pending or self._attacks or self._links)
        )

    async def _act(self, reached: dict[str, Standing], request_id: str) -> None:
        """Audit, database, memory: in this order, one at a time."""
        async with self._acting:
            acted = {}
            for account, standing in reached.items():
                watched = self._watch.of(account)
                if not watched.loaded:
                    await self._load(account)
                if graver(standing, watched.status) and not self._is_told(account, standing):
                    await self._audit.append(self._entry(account, standing, request_id))
                    acted[account] = standing
            if self.settings.shadow:
                self._would_be |= acted
                acted = {}
            waiting = dict(self._watch.waiting())
            waiting |= {account: self._watch.of(account) for account in acted}
            await self._write(waiting, acted)

    def _is_told(self, account: str, standing: Standing) -> bool:
        """In shadow mode each is said once."""
        return self.settings.shadow and not graver(standing, self._would_be.get(account, "active"))

    def _entry(self, account: str, standing: Standing, request_id: str) -> Entry:
        watched = self._watch.of(account)
        at = self._clock()
        kinds: dict[str, int] = {}
        for event in watched.pending:
            kinds[event.kind] = kinds.get(event.kind, 0) + 1
        lately = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "volume"
        verb = "would be" if self.settings.shadow else "is"
        return _consequence(
            request_id,
            f"{account} {verb} {standing}: risk {self._watch.risk(account, at):.2f}, "
            f"extraction {watched.account.extraction(at, self.settings):.2f}; lately {lately}",
        )

    async def _calm(self, account: str, watched: Watched) -> None:
        async with self._acting:
            if watched.status == "slowed":
                detail = f"{account} is active again: its risk has decayed"
                await self._audit.append(_consequence("decay", detail))
                await self._write({account: watched}, {account: "active"})

    async def _write(
        self, waiting: dict[str, Watched], acted: dict[str, Standing] | None = None
    ) -> None:
        """What is written is no longer pending; what failed still is."""
        acted = acted or {}
        changes = {
            account: Change(
                watched.account,
                tuple(watched.pending),
                watched.generation,
                acted.get(account, watched.status),
                f"risk {self._watch.risk(account, self._clock()):.2f}" if account in acted else "",
            )
            for account, watched in waiting.items()
            if watched.pending
            or account in acted
            or watched.account.volume.requests >= _VOLUME_KEPT
        }
        links, attacks = tuple(self._links), dict(self._attacks)
        kept = await self.ledger.add(changes, links, attacks, self.settings)
        for account, change in changes.items():
            del waiting[account].pending[: len(change.events)]
            waiting[account].status = change.status
            self._watch.replace(account, kept[account])
        for watched in waiting.values():
            watched.changed = False
        for link in links:
            self._links.pop(link, None)
        for name in attacks:
            self._attacks.pop(name, None)
        self._flushed_at = self._clock()
        self._n_pending = 0


def _consequence(request_id: str, detail: str) -> Entry:
    return Entry(
        time=now(),
        kind="admin",
        request_id=request_id,
        surface="guard account",
        user="guard",
        status=200,
        detail=detail,
    )
