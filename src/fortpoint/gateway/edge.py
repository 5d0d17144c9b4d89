"""The outermost layer: nothing under /v1 or /api ends without its entry in the audit log.

It stands around Litestar, so that a wrong path, a wrong method or a crash inside the
framework takes the same way out as an answer:

1. open the exchange, run the application in a task of its own
2. stop it when the client goes away, when the time is over, or when the server stops
3. before the last byte: the entry is in the log, or the answer is withheld
4. release what the exchange holds, count, write one line of log

Not protected here: what a step says no to; see ``app.py`` for the steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from fortpoint.errors import AuditUnavailable, EngineUnavailable, FortPointError, RequestTimeout
from fortpoint.gateway import faults, record, wire
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.services import Services

_logger = logging.getLogger("fortpoint.gateway")

_END_S = 10.0
_LINGER_S = 2.0
_LINGER_BYTES = 64 * 1024 * 1024

_SURFACES = frozenset(
    {
        "/",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/openapi.json",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/moderations",
        "/v1/models",
        "/api/engine",
        "/api/score",
        "/api/presets",
        "/api/accounts",
        "/api/accounts/decisions",
        "/api/accounts/evidence",
        "/api/alerts",
        "/api/features/stats",
        "/api/audit/checkpoint",
        "/api/audit/cosignature",
        "/api/audit/entries",
        "/api/audit/proof/consistency",
        "/api/audit/proof/inclusion",
    }
)


class Edge:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        surface, audited = _surface_of(scope["path"])
        exchange = Exchange(self._services, surface, audited)
        exchange.attach(scope)
        self._services.meter.arrived()
        channel = _Channel(exchange, scope, receive, send)
        work = asyncio.create_task(self._run(scope, channel))
        watch = asyncio.create_task(channel.watch())
        limit_s = self._services.config.server.request_timeout_s
        stopping = True
        try:
            await asyncio.wait({work, watch}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            stopping = False
        finally:
            if channel.complete and _is_whole(work):  # most: nothing is left to wait for
                watch.cancel()
                self._account(channel)
            else:
                ending = asyncio.create_task(self._end(channel, work, watch, stopping))
                await _uncancelled(ending)

    async def _run(self, scope: Scope, channel: _Channel) -> None:
        await self._app(scope, channel.receive, channel.send)

    async def _end(
        self,
        channel: _Channel,
        work: asyncio.Task[None],
        watch: asyncio.Task[None],
        stopping: bool,
    ) -> None:
        fault = _fault_of_end(work, channel, stopping)
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
        try:
            await self._last_step(channel, channel.exchange.release)
            if not channel.complete:
                await self._last_step(
                    channel, lambda: channel.fail(channel.exchange.fault or fault)
                )
        finally:
            self._account(channel)

    async def _last_step(self, channel: _Channel, step: Callable[[], Awaitable[None]]) -> None:
        """Take it, but wait no longer for a client that does not read."""
        try:
            async with asyncio.timeout(_END_S):
                await step()
        except Exception as error:  # noqa: BLE001 - the other steps must be taken, whatever broke
            _logger.error(
                "exchange id=%s end=%s", channel.exchange.request_id, type(error).__name__
            )

    def _account(self, channel: _Channel) -> None:
        exchange = channel.exchange
        self._services.meter.ended(exchange.surface, channel.status, channel.code, exchange.usage)
        _logger.info(
            "request id=%s surface=%s status=%d code=%s key=%s prompt=%d completion=%d ms=%d",
            exchange.request_id,
            exchange.surface,
            channel.status,
            channel.code,
            exchange.principal.key_id if exchange.principal else "-",
            exchange.usage.prompt,
            exchange.usage.completion,
            (time.monotonic() - exchange.started) * 1000,
        )


class _Channel:
    """The connection of one exchange; holds the answer back until its entry is written."""

    def __init__(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        self.exchange = exchange
        self.status = 500
        self.code = "ok"
        self.complete = False
        self.gone = asyncio.Event()
        self._scope = scope
        self._receive = receive
        self._send = send
        self._uploaded = asyncio.Event()
        self._start: Any = None
        self._begun = False
        self._body = bytearray()

    async def receive(self) -> Any:
        if self._uploaded.is_set():
            await self.gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone.set()
        elif not message.get("more_body", False):
            self._uploaded.set()
        return message

    async def watch(self) -> None:
        """Return when the client has gone away, once its body was read."""
        await self._uploaded.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self.status = message["status"]
            if self.exchange.streaming:
                await self._begin()
        elif message["type"] == "http.response.body":
            await self._send_body(message.get("body", b""), message.get("more_body", False))

    async def fail(self, fault: FortPointError | None) -> None:
        """End with an error, or (None) without a word to a client that has gone."""
        if fault is None:
            self.status, self.code = record.GONE_STATUS, record.GONE_CODE
            self.complete = True
            await self._record_quietly(None)
            return
        fault = await self._record_fault(fault)
        self.code = fault.code
        body = wire.encode(faults.body_of(fault, self.exchange.note()))
        if self._begun:
            await self._finish(b"data: " + body + b"\n\n")
            return
        self.status = fault.status
        headers = [*self._kept_headers(), *faults.headers_of(fault)]
        headers.append((b"content-type", b"application/json"))
        await self._respond(headers, body)

    async def _send_body(self, body: bytes, more: bool) -> None:
        if self._begun and more:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            return
        self._body += body
        if more:
            return
        if self.exchange.fault is not None:
            await self.fail(None if self.gone.is_set() else self.exchange.fault)
            return
        try:
            await self._record_answer()
        except AuditUnavailable as error:
            await self.fail(error)
            return
        if self._begun:
            await self._finish(bytes(self._body))
        else:
            await self._respond(list(self._start["headers"]), bytes(self._body))

    async def _record_answer(self) -> None:
        """Most answers were recorded by their handler already, whose receipt they carry."""
        if self.exchange.audited and not self.exchange.recording:
            await self.exchange.record(record.answered(self.exchange, self.status))
        elif self.exchange.recording and self.exchange.receipt is None:
            raise AuditUnavailable("the record of this answer could not be written")

    async def _record_fault(self, fault: FortPointError) -> FortPointError:
        """The fault to report: another one when it cannot be recorded."""
        if not self.exchange.audited or isinstance(fault, AuditUnavailable):
            await self._record_quietly(fault)
            return fault
        try:
            await self.exchange.record(record.faulted(self.exchange, fault))
        except AuditUnavailable as error:
            return error
        return fault

    async def _record_quietly(self, fault: FortPointError | None) -> None:
        exchange = self.exchange
        if exchange.recording:
            await exchange.settle()
        if not exchange.audited or exchange.recording:
            return
        entry = record.gone(exchange) if fault is None else record.faulted(exchange, fault)
        with contextlib.suppress(AuditUnavailable):
            await exchange.record(entry)

    def _kept_headers(self) -> list[tuple[bytes, bytes]]:
        headers = self._start["headers"] if self._start else ()
        return [(name, value) for name, value in headers if name.lower() == b"allow"]

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"x-request-id", self.exchange.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if self.exchange.audited:
            headers.append((b"cache-control", b"no-store"))
        if self.exchange.detectors:
            headers.append((b"x-fortpoint-guard", ",".join(self.exchange.detectors).encode()))
        return headers

    async def _begin(self) -> None:
        self._begun = True
        headers = [*self._start["headers"], *self._own_headers()]
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})

    async def _respond(self, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self.exchange.release()
        unread = self._has_unread_body()
        kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        kept += [(b"content-length", b"%d" % len(body)), *self._own_headers()]
        if self.status == 204:
            kept = [(name, value) for name, value in kept if name != b"content-length"]
        if unread:  # what follows on this connection could be taken for another request
            kept.append((b"connection", b"close"))
        self._begun = True
        await self._send({"type": "http.response.start", "status": self.status, "headers": kept})
        if unread and not self._waits_to_be_asked():
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._linger()
            body = b""
        await self._finish(body)

    async def _finish(self, body: bytes) -> None:
        await self.exchange.release()
        self.complete = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _has_unread_body(self) -> bool:
        headers = dict(self._scope["headers"])
        announced = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        return announced and not self._uploaded.is_set()

    def _waits_to_be_asked(self) -> bool:
        """True when the client holds its body back until it gets a 100."""
        return any(name == b"expect" for name, _ in self._scope["headers"])

    async def _linger(self) -> None:
        """Read and drop for a short while: closing at once would reset the connection and
        take the error away from a client that is still sending (RFC 9112, section 9.6)."""
        n_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while n_bytes < _LINGER_BYTES and not self._uploaded.is_set():
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        return
                    n_bytes += len(message.get("body", b""))


def _surface_of(path: str) -> tuple[str, bool]:
    """The route's name for metrics and entries, and whether it must be recorded.

    Empty segments count for nothing, as in the router, so that ``//v1/x`` is recorded too.
    """
    segments = [segment for segment in path.split("/") if segment]
    clean = "/" + "/".join(segments)
    audited = segments[:1] in (["v1"], ["api"])
    if clean in _SURFACES:
        return clean, audited
    if segments[:2] == ["v1", "models"]:
        return "/v1/models/{model}", audited
    if segments[:2] == ["api", "presets"] and len(segments) == 3:
        return "/api/presets/{preset}", audited
    if segments[:3] == ["api", "audit", "requests"] and len(segments) == 4:
        return "/api/audit/requests/{request_id}", audited
    return (f"/{segments[0]}/*" if audited else "other"), audited


def _fault_of_end(
    work: asyncio.Task[None], channel: _Channel, stopping: bool
) -> FortPointError | None:
    """Why the exchange is over although its response is not; None when the client left."""
    if work.done() and not work.cancelled() and (error := work.exception()) is not None:
        return faults.fault_of(error.__cause__ or error)
    if stopping:
        return EngineUnavailable("the server is stopping; try again")
    if channel.gone.is_set():
        return None
    if work.done():
        return FortPointError("an internal error; the request was not answered")
    limit_s = channel.exchange.services.config.server.request_timeout_s
    return RequestTimeout(f"the request took longer than {limit_s:g} seconds")


def _is_whole(work: asyncio.Task[None]) -> bool:
    """Whether it ran to its end: neither cancelled nor broken."""
    return work.done() and not work.cancelled() and work.exception() is None


async def _uncancelled(task: asyncio.Task[None]) -> None:
    """Wait for ``task`` to end even when the waiter is cancelled, then pass that on."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
