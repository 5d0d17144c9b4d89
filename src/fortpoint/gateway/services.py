"""What the gateway needs of the other rooms, built once and passed in.

The seams are protocols, so that a test puts a fake behind any of them. Nothing here opens a
file or a socket; ``server.py`` builds the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fortpoint.access.keys import Principal
from fortpoint.audit.entry import Entry
from fortpoint.audit.log import Receipt
from fortpoint.config import Config
from fortpoint.engine.client import Engine
from fortpoint.errors import ConfigError
from fortpoint.gateway.limits import Places
from fortpoint.gateway.metrics import Meter
from fortpoint.gateway.models import Catalogue
from fortpoint.types import Message, Reading, Role, Verdict


class Keys(Protocol):
    """Names the principal of a bearer token; raises ``Unauthenticated``."""

    async def authenticate(self, token: str) -> Principal: ...


class Audit(Protocol):
    """Returns when the entry is on disk; raises ``AuditUnavailable``."""

    async def append(self, entry: Entry) -> Receipt: ...


class Judge(Protocol):
    """The guard. ``judge`` is pure and does not raise: a broken detector is ``failed``."""

    @property
    def detectors(self) -> tuple[str, ...]: ...

    def judge(
        self,
        messages: Sequence[Message],
        reading: Reading | None,
        trusted: frozenset[Role] = frozenset(),
    ) -> Verdict: ...


@dataclass(frozen=True)
class Services:
    """``guard`` is None exactly when the configuration turns the guard off."""

    config: Config
    engine: Engine
    guard: Judge | None
    keys: Keys
    audit: Audit
    meter: Meter = field(default_factory=Meter)
    places: Places = field(init=False)
    catalogue: Catalogue = field(init=False)

    def __post_init__(self) -> None:
        if self.config.guard.enabled != (self.guard is not None):
            raise ConfigError("guard.enabled and the guard that was loaded do not agree")
        object.__setattr__(self, "places", Places(self.config.server.max_concurrent_per_key))
        object.__setattr__(self, "catalogue", Catalogue(self.engine))
