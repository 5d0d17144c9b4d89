"""From a policy to the services: its accounts, its second stage, and its entry in the record.

    parts = await in_force(source, config, database, audit, stack)

A policy that differs from the last one in force has an entry of its own in the record, before
the first request that it decides about.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass

import msgspec

from fortpoint.audit.entry import Entry, new_request_id, now
from fortpoint.audit.log import AuditLog
from fortpoint.config import Config
from fortpoint.gateway.policy_source import PolicySource
from fortpoint.guard.account_desk import AccountDesk
from fortpoint.guard.account_ledger import AccountLedger
from fortpoint.guard.policy_file import LoadedPolicy
from fortpoint.guard.second_stage import HttpSecondStage, SecondStage
from fortpoint.store.database import Database


@dataclass(frozen=True)
class PolicyParts:
    """What the services need of a policy."""

    loaded: LoadedPolicy
    desk: AccountDesk | None
    second_stage: SecondStage | None


async def in_force(
    source: PolicySource,
    config: Config,
    database: Database,
    audit: AuditLog,
    stack: AsyncExitStack,
) -> PolicyParts:
    """The services' parts; ``stack`` closes them. Raises ``AuditUnavailable``, ``StorageError``."""
    if not config.guard.enabled:
        return PolicyParts(source.loaded, None, None)
    policy, ledger = source.loaded.policy, AccountLedger(database)
    await _record_change(source.loaded, ledger, audit)
    stage: SecondStage | None = None
    if policy.second_stage is not None:
        key = source.targets[0].api_key
        stage = HttpSecondStage(policy.second_stage, None if key is None else key.header())
        stack.push_async_callback(stage.close)
    if not policy.account.enabled:
        return PolicyParts(source.loaded, None, stage)
    settings = msgspec.structs.replace(
        policy.account, shadow=policy.account.shadow or policy.shadow
    )
    desk = await AccountDesk.open(ledger, audit, settings)
    stack.push_async_callback(desk.flush)
    return PolicyParts(source.loaded, desk, stage)


async def _record_change(loaded: LoadedPolicy, ledger: AccountLedger, audit: AuditLog) -> None:
    before = await ledger.policy_in_force()
    if before == loaded.sha256:
        return
    instead = f" in the place of sha256 {before}" if before else ""
    await audit.append(
        Entry(
            time=now(),
            kind="admin",
            request_id=new_request_id("pol"),
            surface="guard policy",
            user="guard",
            status=200,
            detail=f"version {loaded.version}, sha256 {loaded.sha256} is in force{instead}",
        )
    )
    await ledger.put_in_force(loaded.sha256)
