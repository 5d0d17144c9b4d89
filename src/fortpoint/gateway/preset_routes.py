"""Presets as operators keep them. What changes is in the record, or it is undone."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import HttpMethod, Request, delete, route
from litestar.types import ASGIApp

from fortpoint.access.presets import is_name
from fortpoint.errors import NotFound
from fortpoint.gateway import presets, record, steps
from fortpoint.gateway.exchange import Exchange


@route("/api/presets", http_method=[HttpMethod.GET, HttpMethod.POST], status_code=200)
async def list_or_save(request: Request[Any, Any, Any]) -> ASGIApp:
    """One handler: of two with one path, Litestar's ``Allow`` would name only the first."""
    return await (_save(request) if request.method == "POST" else _list(request))


async def _list(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    steps.require(await steps.admit(request, exchange), "operator")
    found = tuple(presets.card(one) for one in await exchange.services.presets.list())
    exchange.answers(found)
    await exchange.record(record.answered(exchange))
    return steps.json(presets.PresetList(data=found, fortpoint=exchange.note()))


async def _save(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    services = exchange.services
    principal = await steps.admit(request, exchange)
    steps.require(principal, "operator")
    ask = presets.parse(await steps.body(request, exchange))
    exchange.model = await services.catalogue.require(ask.model)
    await presets.try_out(services.engine, exchange.model, ask.steer, exchange.request_id)
    preset = presets.made(ask.name, ask.model, ask.steer, principal.user)
    keys = None if ask.keys is msgspec.UNSET else ask.keys
    default_of = None if ask.default_of is msgspec.UNSET else ask.default_of
    exchange.detail = presets.described(preset, keys, default_of)
    async with services.presets.kept_if_recorded(preset.name):
        await services.presets.save(preset, keys, default_of)
        exchange.answers([preset.name, preset.sha256])
        await exchange.record(record.answered(exchange))
    return steps.json(
        presets.PresetSaved(saved=preset.name, sha256=preset.sha256, fortpoint=exchange.note())
    )


@delete("/api/presets/{preset:str}", status_code=200)
async def remove(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    services = exchange.services
    steps.require(await steps.admit(request, exchange), "operator")
    name = str(request.path_params["preset"])
    if not is_name(name):
        raise NotFound("there is no preset of this name")
    exchange.detail = f"remove preset {name}"
    async with services.presets.kept_if_recorded(name):
        await services.presets.remove(name)
        exchange.answers([name])
        await exchange.record(record.answered(exchange))
    return steps.json(presets.PresetRemoved(removed=name, fortpoint=exchange.note()))
