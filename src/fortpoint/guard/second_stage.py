"""Asks another model about the uncertain few: an OpenAI-compatible moderation or guard model.

    stage = HttpSecondStage(policy.second_stage, "Bearer ...")
    score = await stage.ask(text)            # 0..1; SecondStageFailed when it cannot tell

It sees the text of a request, so it must be trusted with it. Nothing of an answer but a number
is used, nothing of it is shown, and no error names the address or the key. One attempt: what
takes longer than the policy says, sends too much, or redirects has failed, and the policy says
what that means. Compressed answers, cookies and proxies' settings are ignored; certificates are
always verified.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp
import msgspec
import yarl

from fortpoint.errors import GuardFailed
from fortpoint.guard.policy import SecondStagePolicy

MAX_ANSWER_BYTES = 256 * 1024

_UNSAFE = ("unsafe", "safety: unsafe")
_SAFE = ("safe", "safety: safe")


class SecondStageFailed(GuardFailed):
    """It did not tell in time. Whether that closes the gate, the policy says."""


class SecondStage(Protocol):
    """Something dearer that is asked only where the first stage is uncertain."""

    async def ask(self, text: str) -> float: ...

    async def close(self) -> None: ...


class _Category(msgspec.Struct, frozen=True):
    flagged: bool = False
    category_scores: Mapping[str, float] = {}


class _Moderations(msgspec.Struct, frozen=True):
    results: tuple[_Category, ...]


class _Said(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Said


class _Chat(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...]


class HttpSecondStage:
    """For one event loop. ``authorization`` is the header that it asks with, kept nowhere else."""

    def __init__(self, settings: SecondStagePolicy, authorization: str | None) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_concurrent)
        headers = {
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "fortpoint",
        }
        if authorization:
            headers["authorization"] = authorization
        secure = settings.url.startswith("https:")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=settings.max_concurrent,
                ssl=ssl.create_default_context() if secure else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers=headers,
        )

    async def ask(self, text: str) -> float:
        """How unsafe it is, in 0..1. Raises ``SecondStageFailed``."""
        if self._places.locked():
            raise SecondStageFailed("the second stage is busy, so the request was not answered")
        async with self._places:
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return _score(self._settings, await self._post(_end(text, self._settings)))
            except TimeoutError:
                why = "took too long"
            except (aiohttp.ClientError, OSError):
                why = "cannot be reached"
            except (msgspec.MsgspecError, ValueError, RecursionError, LookupError):
                why = "answered what cannot be read"
        raise SecondStageFailed(f"the second stage {why}, so the request was not answered")

    async def close(self) -> None:
        await self._session.close()

    async def _post(self, text: str) -> bytes:
        """The body of an answer with status 200."""
        path, body = _question(self._settings, text)
        url = yarl.URL(self._settings.url.rstrip("/") + path, encoded=True)
        async with self._session.post(
            url, data=msgspec.json.encode(body), allow_redirects=False
        ) as response:
            if response.status != 200:
                raise ValueError("another status than 200")
            read = bytearray()
            async for piece in response.content.iter_chunked(16_384):
                read += piece
                if len(read) > MAX_ANSWER_BYTES:
                    raise ValueError("too much")
            return bytes(read)


def _question(settings: SecondStagePolicy, text: str) -> tuple[str, dict[str, Any]]:
    if settings.kind == "moderations":
        body = {"input": text} | ({"model": settings.model} if settings.model else {})
        return "/moderations", body
    return "/chat/completions", {
        "model": settings.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
    }


def _score(settings: SecondStagePolicy, body: bytes) -> float:
    if settings.kind == "chat":
        return _of_chat(msgspec.json.decode(body, type=_Chat))
    (result,) = msgspec.json.decode(body, type=_Moderations).results
    scores = (*result.category_scores.values(), 1.0 if result.flagged else 0.0)
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score that is no number")
    return min(1.0, max(0.0, *scores))


def _of_chat(answer: _Chat) -> float:
    """A guard model says ``safe`` or ``unsafe`` in its first line."""
    said = (answer.choices[0].message.content or "").strip().lower()
    if said.startswith(_UNSAFE):
        return 1.0
    if said.startswith(_SAFE):
        return 0.0
    raise ValueError("neither safe nor unsafe")


def _end(text: str, settings: SecondStagePolicy) -> str:
    """Its last bytes, as many as may be sent."""
    content = text.encode("utf-8", "replace")
    return content[-settings.max_text_bytes :].decode("utf-8", "ignore")
