"""The steps that every route takes: name the caller, read the body, write the answer."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from fortpoint.access.keys import Principal
from fortpoint.errors import Forbidden, Unauthenticated
from fortpoint.gateway import limits, wire
from fortpoint.gateway.exchange import Exchange


async def admit(request: Request[Any, Any, Any], exchange: Exchange) -> Principal:
    """Name the principal, refuse it while its account is closed, take one of its key's places."""
    services = exchange.services
    principal = await services.keys.authenticate(_bearer(request))
    exchange.principal = principal
    if services.conduct.desk is not None and principal.role != "operator":
        await services.conduct.desk.admit(principal.key_id, principal.user)
    exchange.resources.enter_context(services.places.take(principal.key_id))
    return principal


def require(principal: Principal, role: str) -> None:
    """Raise ``Forbidden`` unless the principal has this role."""
    if principal.role != role:
        raise Forbidden(f"this needs the role {role}; this key has {principal.role}")


async def body(request: Request[Any, Any, Any], exchange: Exchange) -> bytes:
    """The body, within the server's limit; its hash is noted."""
    max_bytes = exchange.services.config.server.max_body_bytes
    read = await limits.read_json_body(request.receive, request.headers, max_bytes)
    exchange.asked(read)
    return read


def json(value: object, status: int = 200) -> ASGIApp:
    return ASGIResponse(body=wire.encode(value), status_code=status, media_type="application/json")


def _bearer(request: Request[Any, Any, Any]) -> str:
    """The one bearer token. Two headers are refused: two readers may pick different ones."""
    given = request.headers.getall("authorization", [])
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("send a key as `Authorization: Bearer YOUR_KEY`")
    return token.strip()
