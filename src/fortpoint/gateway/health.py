"""/health/live: this process answers. /health/ready: the engine answers too."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from fortpoint.errors import EngineError
from fortpoint.gateway.models import Catalogue

_READY_TIMEOUT_S = 2.0


class Health(msgspec.Struct, frozen=True):
    status: Literal["live", "ready", "starting"]
    model: str | None = None


async def readiness(catalogue: Catalogue) -> Health:
    """``starting`` while there is no engine to ask, also when it is being restarted."""
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            description = await catalogue.fresh()
    except (EngineError, TimeoutError):
        return Health("starting")
    return Health("ready", description.model)
