"""HTTP/1.1 to the upstream servers: kept connections, limits, and what went wrong, sorted.

Redirects are never followed, nothing is decompressed, cookies and proxy variables are
ignored, certificates are always verified. The sizes of status line, headers and their number
are limited by the parser; bodies by ``Reply``.

Not limited here: how fast a server may answer. A slow reader slows the server down instead.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import msgspec
import yarl
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.tracing import Trace

from fortpoint.config import Upstream
from fortpoint.engine.upstream.target import Target
from fortpoint.errors import (
    ContextLengthExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    FortPointError,
    InvalidRequest,
)

MAX_ERROR_BYTES = 64 * 1024

# Shorter than the 5 s after which common servers close: a request that meets a closing
# connection would count as a failure.
_KEEP_ALIVE_S = 4.0
_DNS_S = 30
_LONGEST_WAIT_S = 60.0
_DEFAULT_WAIT_S = 1.0
_DRAIN_S = 0.1

_BLAMES_US = frozenset({401, 403, 404})
_TRANSIENT = frozenset({408, 409, 425})
_BLAMES_REQUEST = frozenset({400, 413, 422})


class Fault(Exception):
    """One attempt failed with ``error``.

    ``elsewhere``: another server, or the same one later, may do better. ``counts`` towards
    the server's breaker. ``wait_s``: it asked to be left alone for so long.
    """

    def __init__(
        self,
        error: FortPointError,
        *,
        elsewhere: bool = True,
        counts: bool = True,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.elsewhere = elsewhere
        self.counts = counts
        self.wait_s = wait_s


class Reply:
    """An open answer with status 200. ``read`` gives its bytes as they come."""

    def __init__(self, response: aiohttp.ClientResponse, max_bytes: int) -> None:
        self._response = response
        self._left = max_bytes
        self.content_type = response.content_type

    async def read(self, deadline: float) -> bytes:
        """Some bytes; none at the end. Raises ``Fault``. ``deadline`` is the loop's time."""
        with _translated():
            async with asyncio.timeout_at(deadline):
                piece = await self._response.content.readany()
        self._left -= len(piece)
        if self._left < 0:
            # Callers can provoke this, so it must not close the server to others.
            raise Fault(
                EngineError("an upstream server's answer is too large"),
                elsewhere=False,
                counts=False,
            )
        return piece

    async def read_all(self, deadline: float) -> bytes:
        pieces = []
        while piece := await self.read(deadline):
            pieces.append(piece)
        return b"".join(pieces)

    async def finish(self) -> None:
        """After the answer's own end: keep the connection if the body ends now, else close it."""
        try:
            more = await self.read(asyncio.get_running_loop().time() + _DRAIN_S)
        except Fault:
            more = b"?"
        if more:
            self._response.close()

    def close(self) -> None:
        """Give the connection up, with whatever is still to come on it."""
        self._response.close()


class _Connector(aiohttp.TCPConnector):
    """Gives up a kept connection on which something came that nobody had asked for: the library
    would take those bytes for the answer to the next request, which is another caller's."""

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


class Http:
    """The connections of one process to all upstreams. Needs a running loop."""

    def __init__(self, config: Upstream, *, tls: bool) -> None:
        self._max_bytes = config.max_answer_bytes
        connector = _Connector(
            limit=0,  # the engine counts its requests itself
            ttl_dns_cache=_DNS_S,
            keepalive_timeout=_KEEP_ALIVE_S,
            ssl=ssl.create_default_context() if tls else True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(
                connect=config.connect_timeout_s, sock_connect=config.connect_timeout_s
            ),
            headers={
                "accept-encoding": "identity",
                "content-type": "application/json",
                "user-agent": "fortpoint",
            },
        )

    async def post(self, target: Target, path: str, body: bytes, deadline: float) -> Reply:
        """Ask, and wait for the answer's headers. Raises ``Fault``."""
        headers = {"authorization": target.api_key.header()} if target.api_key else None
        with _translated():
            async with asyncio.timeout_at(deadline):
                response = await self._session.post(
                    yarl.URL(target.url + path, encoded=True),
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                )
        try:
            if response.status != 200:
                raise await _fault_of_status(response, deadline)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise Fault(EngineError("an upstream server sent a compressed answer"))
        except BaseException:
            response.close()
            raise
        return Reply(response, self._max_bytes)

    async def close(self) -> None:
        await self._session.close()


@contextmanager
def _translated() -> Iterator[None]:
    """What the client library raises, as a ``Fault``."""
    try:
        yield
    except TimeoutError:  # some of the library's errors are this too
        raise Fault(EngineError("an upstream server took too long")) from None
    except aiohttp.ClientSSLError:
        raise Fault(EngineUnavailable("an upstream server could not prove who it is")) from None
    except aiohttp.ClientConnectorError:
        raise Fault(EngineUnavailable("an upstream server cannot be reached")) from None
    except (aiohttp.ClientResponseError, aiohttp.ClientPayloadError):
        raise Fault(EngineError("an upstream server broke its answer off")) from None
    except (aiohttp.ClientError, OSError):
        raise Fault(EngineUnavailable("an upstream server closed the connection")) from None
    except (
        ValueError,
        HttpProcessingError,
    ):  # an address, a header or a chunk that the library cannot read
        raise Fault(EngineError("an upstream server's answer could not be read")) from None


async def _fault_of_status(response: aiohttp.ClientResponse, deadline: float) -> Fault:
    """Nothing of the answer's text is passed on: it may repeat keys or another's prompt."""
    status = response.status
    if status == 429:
        return Fault(
            EngineBusy("the upstream servers are busy; try again later"),
            counts=False,
            wait_s=_retry_after_s(response.headers.get("retry-after", "")),
        )
    if status in _BLAMES_REQUEST:
        return Fault(await _refusal(response, deadline), elsewhere=False, counts=False)
    if status in _BLAMES_US:
        return Fault(
            EngineError(
                f"an upstream server refused this server (status {status}); the operator "
                "must check its address, key and model"
            )
        )
    if status >= 500 or status in _TRANSIENT:
        return Fault(EngineUnavailable(f"an upstream server failed (status {status}); try again"))
    if 300 <= status < 400:
        return Fault(EngineError("an upstream server sent us elsewhere, which is not followed"))
    return Fault(EngineError(f"an upstream server answered with status {status}"))


async def _refusal(response: aiohttp.ClientResponse, deadline: float) -> FortPointError:
    try:
        body = await Reply(response, MAX_ERROR_BYTES).read_all(deadline)
        code = msgspec.json.decode(body, type=_ErrorBody).error.code
    except (Fault, msgspec.MsgspecError, ValueError, RecursionError):
        code = None
    if code == "context_length_exceeded":
        return ContextLengthExceeded("the prompt and the answer are longer than the model takes")
    return InvalidRequest(f"the upstream server refused this request (status {response.status})")


class _ErrorDetail(msgspec.Struct, frozen=True):
    code: str | int | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorDetail


def _retry_after_s(value: str) -> float:
    """RFC 9110, section 10.2.3; a date counts as absent."""
    if value.isascii() and value.isdigit():
        return min(float(value[:6]), _LONGEST_WAIT_S)
    return _DEFAULT_WAIT_S
