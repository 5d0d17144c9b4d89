"""Which model is served: asked of the engine, kept for a while, in OpenAI's format."""

from __future__ import annotations

import time
from typing import Literal

import msgspec

from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import Description, DictionaryCard, UpstreamState
from fortpoint.errors import ModelNotFound

_MAX_AGE_S = 5.0


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model that can be asked. ``digest`` names the exact weights."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fortpoint"
    digest: str
    max_context: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """The engine as an operator sees it."""

    model: str
    digest: str
    architecture: str
    dtype: str
    max_context: int
    created: int
    pid: int
    running: int
    waiting: int
    protections: dict[str, bool]
    adapters: tuple[str, ...]
    dictionaries: tuple[DictionaryCard, ...]
    directions: tuple[str, ...]
    upstreams: tuple[UpstreamState, ...]


class Catalogue:
    """What the engine serves. A description is asked for again after five seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: Description | None = None
        self._asked_at = 0.0

    async def current(self) -> Description:
        """What runs. Raises ``EngineUnavailable``."""
        if self._known is None or time.monotonic() - self._asked_at > _MAX_AGE_S:
            return await self.fresh()
        return self._known

    async def fresh(self) -> Description:
        """What runs, asked now. Raises ``EngineUnavailable``."""
        self._known = None
        self._known = await self._engine.describe()
        self._asked_at = time.monotonic()
        return self._known

    async def require(self, name: str) -> Description:
        """The model called ``name``. Raises ``ModelNotFound``."""
        description = await self.current()
        if name != description.model:
            raise ModelNotFound(
                f"no such model here; this server has {description.model!r}", param="model"
            )
        return description


def card(description: Description) -> Model:
    return Model(
        id=description.model,
        created=description.created,
        digest=description.digest,
        max_context=description.max_context,
    )


def state(description: Description) -> EngineState:
    names = EngineState.__struct_fields__
    return EngineState(**{name: getattr(description, name) for name in names})
