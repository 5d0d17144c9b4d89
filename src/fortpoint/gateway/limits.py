"""Limits that hold before anything is parsed, kept or computed.

- body bytes: refused by the announced length, and counted while reading when none is announced
- prompt bytes and number of texts: after parsing, before the engine hears of the request
- requests that one key has running

Not limited here: how often a key may ask over time, and how slowly a client may send its
headers (put a reverse proxy in front where the network is not trusted).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fortpoint.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    PayloadTooLarge,
    TooManyRequests,
    UnsupportedMediaType,
)

Receive = Callable[[], Awaitable[Any]]


class Places:
    """How many requests each key has running. Not shared between processes."""

    def __init__(self, per_key: int) -> None:
        self._per_key = per_key
        self._taken: dict[str, int] = {}

    @contextmanager
    def take(self, key_id: str) -> Iterator[None]:
        """One place for the time of the block. Raises ``TooManyRequests``."""
        taken = self._taken.get(key_id, 0)
        if taken >= self._per_key:
            raise TooManyRequests(
                f"this key has {self._per_key} requests running, its most; try again when one ends"
            )
        self._taken[key_id] = taken + 1
        try:
            yield
        finally:
            self._taken[key_id] -= 1
            if not self._taken[key_id]:
                del self._taken[key_id]

    @property
    def taken(self) -> int:
        """Places taken by all keys."""
        return sum(self._taken.values())


async def read_json_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The body, at most ``max_bytes`` of it.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, and ``InvalidRequest`` when the
    client goes away in the middle.
    """
    _check_media_type(headers.get("content-type"))
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the request ended before its body did")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def check_texts(texts: Iterable[str], max_bytes: int, param: str) -> None:
    """Refuse texts that no tokenizer, database or terminal should see, and too many bytes."""
    n_bytes = 0
    for text in texts:
        if "\x00" in text:
            raise InvalidRequest("the text holds a NUL character; remove it", param=param)
        try:
            n_bytes += len(text.encode())
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds a lone surrogate", param=param) from None
    if n_bytes > max_bytes:
        raise ContextLengthExceeded(
            f"the text has {n_bytes} bytes; this server takes at most {max_bytes}", param=param
        )


def check_count(count: int, most: int, param: str, what: str) -> None:
    """Refuse more than ``most`` of something."""
    if count > most:
        raise InvalidRequest(f"{count} {what}; this server takes at most {most}", param=param)


def _check_media_type(content_type: str | None) -> None:
    """Absent is taken for JSON; anything else that is not JSON is refused."""
    essence = (content_type or "application/json").partition(";")[0].strip().lower()
    if essence != "application/json":
        raise UnsupportedMediaType("send the body as application/json")


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {max_bytes} bytes")
