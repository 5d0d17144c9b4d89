"""What the gateway needs of the other rooms, built once and passed in.

The seams are protocols, so that a test puts a fake behind any of them. Nothing here opens a
file or a socket; ``server.py`` builds the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from fortpoint.access.keys import Principal
from fortpoint.access.presets import Assigned, Preset
from fortpoint.audit.entry import Content, Entry
from fortpoint.audit.log import Receipt
from fortpoint.audit.prover import Prover
from fortpoint.config import Config
from fortpoint.engine.client import Engine
from fortpoint.errors import ConfigError, NotFound, StorageError
from fortpoint.features.watched import watched
from fortpoint.gateway.conduct import Conduct
from fortpoint.gateway.feature_watch import FeatureWatch, Ledger
from fortpoint.gateway.limits import Places
from fortpoint.gateway.metrics import Meter
from fortpoint.gateway.models import Catalogue
from fortpoint.gateway.policy_in_force import PolicyParts
from fortpoint.guard.policy_file import shipped_policy
from fortpoint.types import Message, Reading, Review, Role, Verdict


class Keys(Protocol):
    """Names the principal of a bearer token; raises ``Unauthenticated``."""

    async def authenticate(self, token: str) -> Principal: ...


class Audit(Protocol):
    """Returns when the entry is on disk; raises ``AuditUnavailable``."""

    async def append(self, entry: Entry, content: Content | None = None) -> Receipt: ...


class AnswerJudge(Protocol):
    """One answer as it grows. What it raises, whatever it is, closes the gate."""

    def add(self, text: str, reading: Reading | None) -> None: ...

    def review(self, *, final: bool) -> Review: ...


class Judge(Protocol):
    """The guard. ``judge`` is pure and does not raise: a broken detector is ``failed``."""

    @property
    def detectors(self) -> tuple[str, ...]: ...

    def answer(self, probes: Sequence[str] | None) -> AnswerJudge: ...

    def judge(
        self,
        messages: Sequence[Message],
        reading: Reading | None,
        trusted: frozenset[Role] = frozenset(),
    ) -> Verdict: ...


class Presets(Protocol):
    """Saved steering; see ``access/presets.py``."""

    async def default_of(self, key_id: str) -> Preset | None: ...

    async def granted(self, key_id: str, name: str) -> Preset | None: ...

    async def named(self, name: str) -> Preset | None: ...

    async def names_of(self, key_id: str) -> tuple[str, ...]: ...

    async def list(self) -> tuple[Assigned, ...]: ...

    async def save(
        self,
        preset: Preset,
        keys_of: Sequence[str] | None = None,
        default_of: Sequence[str] | None = None,
    ) -> None: ...

    async def remove(self, name: str) -> None: ...

    def kept_if_recorded(self, name: str) -> AbstractAsyncContextManager[None]: ...


class NoPresets:
    """Where no database is: there are none, and none can be saved."""

    async def default_of(self, key_id: str) -> None:
        return None

    async def granted(self, key_id: str, name: str) -> None:
        return None

    async def named(self, name: str) -> None:
        return None

    async def names_of(self, key_id: str) -> tuple[str, ...]:
        return ()

    async def list(self) -> tuple[Assigned, ...]:
        return ()

    async def save(
        self,
        preset: Preset,
        keys_of: Sequence[str] | None = None,
        default_of: Sequence[str] | None = None,
    ) -> None:
        raise StorageError("there is no database here to save a preset in")

    async def remove(self, name: str) -> None:
        raise NotFound("there is no preset of this name")

    def kept_if_recorded(self, name: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Services:
    """``guard`` is None exactly when the configuration turns the guard off.

    ``ledger`` may be None only where nothing is watched; ``prover`` where the log is elsewhere;
    ``policy`` where the shipped one holds and no account is watched.
    """

    config: Config
    engine: Engine
    guard: Judge | None
    keys: Keys
    audit: Audit
    presets: Presets = field(default_factory=NoPresets)
    ledger: Ledger | None = None
    prover: Prover | None = None
    meter: Meter = field(default_factory=Meter)
    policy: PolicyParts | None = None
    conduct: Conduct = field(init=False)
    watch: FeatureWatch = field(init=False)
    places: Places = field(init=False)
    catalogue: Catalogue = field(init=False)

    def __post_init__(self) -> None:
        if self.config.guard.enabled != (self.guard is not None):
            raise ConfigError("guard.enabled and the guard that was loaded do not agree")
        parts = self.policy or PolicyParts(shipped_policy(self.config.guard.secrets), None, None)
        conduct = Conduct(parts.loaded, parts.desk, parts.second_stage)
        object.__setattr__(self, "conduct", conduct)
        watch = FeatureWatch(watched(self.config), self.ledger, self.meter)
        object.__setattr__(self, "watch", watch)
        object.__setattr__(self, "places", Places(self.config.server.max_concurrent_per_key))
        object.__setattr__(self, "catalogue", Catalogue(self.engine))
