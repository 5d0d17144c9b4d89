"""A gateway over a real log, to ask for proofs, and a witness's side of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fakes import CUSTOMER, OPERATOR, Bench, FakeKeys
from fortpoint.access.keys import Principal
from fortpoint.audit.checkpoint import VerifierKey
from fortpoint.audit.cosignature import Cosigner
from fortpoint.audit.entry import Content, Entry, commitment, new_request_id, now
from fortpoint.audit.log import AuditLog
from fortpoint.audit.prover import Prover
from fortpoint.gateway.app import create_app
from fortpoint.gateway.services import Services
from fortpoint.store.database import Database

STRANGER = "sk-fp-stranger"
SALT = bytes(range(32))


class Keys(FakeKeys):
    """And a second customer."""

    async def authenticate(self, token: str) -> Principal:
        if token == STRANGER:
            return Principal("strangerkey1", "eve", "customer")
        return await super().authenticate(token)


def cosigner(number: int = 1) -> Cosigner:
    return Cosigner(f"witness/{number}", Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def entry(number: int, key_id: str = "customerkey1", **more: object) -> Entry:
    fields: dict[str, object] = {
        "time": now(),
        "kind": "answer",
        "request_id": new_request_id("req"),
        "surface": "/v1/chat/completions",
        "key_id": key_id,
        "status": 200,
        "detail": f"number {number}",
    }
    return Entry(**(fields | more))  # type: ignore[arg-type]


@dataclass
class World:
    """Ask as anybody; append to the log beside."""

    log: AuditLog
    database: Database
    prover: Prover
    services: Services
    home: Path

    @property
    def key(self) -> VerifierKey:
        return self.log.verifier_key

    async def fill(self, n: int) -> list[str]:
        """Append ``n`` entries of the customer's; their request ids."""
        made = [entry(number) for number in range(n)]
        for one in made:
            await self.log.append(one, Content(SALT))
        return [one.request_id for one in made]

    async def say(self, request: bytes, response: bytes) -> str:
        """An entry with kept content; its request id."""
        said = entry(
            0,
            request_sha256=commitment(SALT, request),
            response_sha256=commitment(SALT, response),
        )
        await self.log.append(said, Content(SALT, request, response))
        return said.request_id

    def client(self, key: str = CUSTOMER) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=create_app(self.services))
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


@asynccontextmanager
async def world(home: Path, address: str, witnesses: int = 2) -> AsyncIterator[World]:
    """``home`` has the log's keys; ``address`` is its database."""
    database = Database(address)
    await database.migrate()
    log = await AuditLog.open(database, home)
    known = [cosigner(number).key for number in range(1, witnesses + 1)]
    prover = Prover(database, log.verifier_key, known)
    bench = Bench()
    services = Services(bench.config, bench.engine, bench.guard, Keys(), log, prover=prover)
    try:
        yield World(log, database, prover, services, home)
    finally:
        await log.close()
        await database.close()


__all__ = ["CUSTOMER", "OPERATOR", "SALT", "STRANGER", "World", "cosigner", "entry", "world"]
