"""Exceptions become OpenAI's error form. Here and nowhere else.

An exception that is not ours becomes a bare 500: its text may hold anything, so neither the
client nor the log sees it; the log has its type and the line that raised it.
"""

from __future__ import annotations

import logging
import math
import traceback

from litestar.exceptions import HTTPException

from fortpoint.errors import (
    AccountSlowed,
    ContentBlocked,
    EngineUnavailable,
    Forbidden,
    FortPointError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    TooManyRequests,
    Unauthenticated,
)
from fortpoint.gateway.wire import ErrorBody, ErrorDetail, Note

_logger = logging.getLogger("fortpoint.gateway")

_RETRY_AFTER_S = b"1"

_POLICY = (ContentBlocked, Unauthenticated, Forbidden, TooManyRequests)


def fault_of(error: BaseException) -> FortPointError:
    """The error that the client is told of."""
    if isinstance(error, FortPointError):
        return error
    if isinstance(error, HTTPException) and error.status_code < 500:
        return _of_router(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    _logger.error("unexpected error=%s at=%s", type(error).__name__, where)
    return FortPointError("an internal error; the request was not answered")


def _of_router(error: HTTPException) -> FortPointError:
    """What Litestar raises before a handler of ours is reached."""
    if error.status_code == 404:
        return NotFound("no such path; GET /openapi.json lists them")
    if error.status_code == 405:
        return MethodNotAllowed("this path does not take that method")
    if error.status_code == 413:
        return PayloadTooLarge("the body is too large")
    return InvalidRequest("the request is not valid")


def is_refusal(fault: FortPointError) -> bool:
    """True when a policy said no; False when something was wrong or broke."""
    return isinstance(fault, _POLICY)


def body_of(fault: FortPointError, note: Note) -> ErrorBody:
    detail = ErrorDetail(fault.message, fault.type, fault.param, fault.code)
    return ErrorBody(detail, note)


def headers_of(fault: FortPointError) -> list[tuple[bytes, bytes]]:
    """Headers that this error needs beside its body."""
    if isinstance(fault, Unauthenticated):
        return [(b"www-authenticate", b'Bearer realm="fortpoint"')]
    if isinstance(fault, AccountSlowed):
        return [(b"retry-after", b"%d" % math.ceil(fault.retry_after_s))]
    if isinstance(fault, TooManyRequests | EngineUnavailable):
        return [(b"retry-after", _RETRY_AFTER_S)]
    return []
