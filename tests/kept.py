"""The gateway over a real database, with keys of its own and a fake engine that can be watched."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from fakes import Bench, FakeEngine, FakeStream
from fortpoint.access.keys import KeyRing
from fortpoint.access.presets import PresetBook
from fortpoint.engine.protocol import Event, Generate, Prefilled, Scanned, Token
from fortpoint.gateway.app import create_app
from fortpoint.gateway.services import Services
from fortpoint.gateway.watch_ledger import WatchLedger
from fortpoint.store.database import Database
from fortpoint.types import Message, Reading

Read = Callable[[str, int], float]
"""How active a target is at a token: its name, and the token's number in prompt or answer."""


class WatchedStream(FakeStream):
    """Adds what is watched to the script's readings."""

    def __init__(self, engine: WatchedEngine, request: Generate) -> None:
        super().__init__(engine, request)
        self._watched = engine
        self._n_tokens = 0

    async def __anext__(self) -> Event:
        event = await super().__anext__()
        if isinstance(event, Prefilled) and event.reading is not None:
            return msgspec.structs.replace(event, reading=self._watched.seen(event.reading))
        if isinstance(event, Token) and self._request.read:
            self._n_tokens += 1
            values = [
                self._watched.answer(name, self._n_tokens - 1) for name in self._watched.names
            ]
            reading = Reading(
                (), 1, b"", (), target_values=struct.pack(f"<{len(values)}f", *values)
            )
            return msgspec.structs.replace(event, reading=reading)
        return event


@dataclass(eq=False)
class WatchedEngine(FakeEngine):
    """Reads ``names``; ``prompt`` and ``answer`` say how active each is."""

    names: tuple[str, ...] = ()
    prompt: Read = lambda name, number: 0.0
    answer: Read = lambda name, number: 0.0

    def __post_init__(self) -> None:
        FakeEngine.__init__(self)

    def seen(self, reading: Reading) -> Reading:
        values = [self.prompt(name, i) for i in range(reading.n_tokens) for name in self.names]
        return msgspec.structs.replace(
            reading,
            targets=self.names,
            target_values=struct.pack(f"<{len(values)}f", *values),
        )

    async def generate(self, request: Generate) -> FakeStream:
        self._check_up()
        self.requests.append(request)
        return WatchedStream(self, request)

    async def scan(self, messages: Sequence[Message]) -> Scanned:
        scanned = await super().scan(messages)
        return msgspec.structs.replace(scanned, reading=self.seen(scanned.reading))


@dataclass
class Kept:
    """A gateway whose keys, presets and alerts are in a database."""

    bench: Bench
    database: Database
    customer: str = ""
    operator: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    services: Services | None = None

    @property
    def book(self) -> PresetBook:
        return PresetBook(self.database)

    @property
    def ledger(self) -> WatchLedger:
        return WatchLedger(self.database)

    @asynccontextmanager
    async def client(self, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
        if self.services is None:
            guard = self.bench.guard if self.bench.config.guard.enabled else None
            self.services = Services(
                self.bench.config,
                self.bench.engine,
                guard,
                KeyRing(self.database),
                self.bench.audit,
                self.book,
                self.ledger,
            )
        transport = httpx.ASGITransport(app=create_app(self.services))
        headers = {"authorization": f"Bearer {key or self.customer}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://gateway", headers=headers
        ) as client:
            yield client


@asynccontextmanager
async def kept(folder: Path, bench: Bench) -> AsyncIterator[Kept]:
    """``bench`` over a database in ``folder``, with a customer's and an operator's key."""
    database = Database.in_home(folder)
    await database.migrate()
    made = Kept(bench, database)
    for role in ("customer", "operator"):
        new = await KeyRing(database).create(role, role)  # type: ignore[arg-type]
        setattr(made, role, new.secret)
        made.ids[role] = new.key_id
    try:
        yield made
    finally:
        await database.close()
