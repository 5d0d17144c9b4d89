"""One request and all that is known of it so far, from its arrival to its last byte.

Every step writes what it learned here; whatever ends the request (an answer, a refusal, an
error, a client that went away) the entry for the audit log is made from it, exactly once.
Resources of the request (its place, its engine stream) are released with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec
from litestar.types import Scope

from fortpoint.access.keys import Principal
from fortpoint.audit.entry import (
    Content,
    Entry,
    Inside,
    commitment,
    new_request_id,
    new_salt,
)
from fortpoint.audit.log import Receipt
from fortpoint.engine.protocol import Description, Done, Prefilled
from fortpoint.errors import FortPointError
from fortpoint.gateway import wire
from fortpoint.gateway.conduct import Conducted
from fortpoint.gateway.services import Services
from fortpoint.types import Usage, Verdict

_STATE_KEY = "exchange"


class Exchange:
    """Mutable; belongs to one request and one task at a time."""

    def __init__(self, services: Services, surface: str, audited: bool) -> None:
        self.services = services
        self.surface = surface
        self.audited = audited
        self.request_id = new_request_id("req")
        self.arrived_at = time.time()
        self.started = time.monotonic()
        self.principal: Principal | None = None
        self.model: Description | None = None
        self.verdict: Verdict | None = None
        self.detectors: tuple[str, ...] = ()
        self.usage = Usage()
        self.finish_reasons: tuple[str, ...] = ()
        self.inside = Inside()
        self.sightings = services.watch.begin()
        self.conducted = Conducted()
        self.asks_logprobs = False
        self.detail: str | None = None
        self.request_sha256: str | None = None
        self.response_sha256: str | None = None
        self.content = Content(new_salt())
        self.streaming = False
        self.fault: FortPointError | None = None
        self.receipt: Receipt | None = None
        self.resources = AsyncExitStack()
        self._recording: asyncio.Task[Receipt] | None = None
        self._first_token_seen = False
        self._prompts: dict[str, int] = {}

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """The exchange that the edge put into the connection's state."""
        exchange = scope["state"][_STATE_KEY]
        if not isinstance(exchange, cls):
            raise TypeError("the edge did not open an exchange")
        return exchange

    def attach(self, scope: Scope) -> None:
        scope.setdefault("state", {})[_STATE_KEY] = self

    def asked(self, body: bytes) -> None:
        """Note what was asked: its hash, and the text where the operator keeps content."""
        self.request_sha256 = commitment(self.content.salt, body)
        if self.services.config.audit.record_content:
            self.content = msgspec.structs.replace(self.content, request=body)

    def answers(self, parts: Sequence[object]) -> None:
        """Note what is answered: a commitment to the compact JSON array of its parts."""
        content = wire.encode(parts)
        self.response_sha256 = commitment(self.content.salt, content)
        if self.services.config.audit.record_content:
            self.content = msgspec.structs.replace(self.content, response=content)

    def count(self, prompt: int = 0, completion: int = 0) -> None:
        """Add tokens, as they are computed."""
        known = self.usage
        self.usage = Usage(known.prompt + prompt, known.completion + completion, known.estimated)
        if completion and not self._first_token_seen:
            self._first_token_seen = True
            self.services.meter.first_token(time.monotonic() - self.started)

    def prefilled(self, event: Prefilled) -> None:
        """Add a prompt's tokens, until ``done`` knows better."""
        self._prompts[event.id] = event.n_prompt_tokens
        self.count(prompt=event.n_prompt_tokens)

    def done(self, event: Done, n_tokens: int) -> None:
        """Put the engine's own count in the place of what was counted on the way: an upstream
        has another tokenizer, and may send several tokens at once."""
        usage = event.usage
        prompt = self._prompts.pop(event.id, usage.prompt)
        self.count(usage.prompt - prompt, usage.completion - n_tokens)
        if usage.estimated is True:
            self.usage = msgspec.structs.replace(self.usage, estimated=True)

    def usage_counts(self) -> wire.UsageCounts:
        prompt, completion = self.usage.prompt, self.usage.completion
        return wire.UsageCounts(prompt, completion, prompt + completion)

    async def record(self, entry: Entry) -> Receipt:
        """Append the one entry of this exchange; a second call gets the first one's receipt.

        What was watched is kept before it. A cancelled caller does not undo it. Raises
        ``AuditUnavailable``.
        """
        if not self.recording:
            self._recording = asyncio.create_task(self._append(entry))
        if self._recording is None:
            raise TypeError("no entry is being written")
        self.receipt = await asyncio.shield(self._recording)
        return self.receipt

    async def _append(self, entry: Entry) -> Receipt:
        if self.sightings.on and self.principal is not None:
            steered = bool(self.inside.presets or self.inside.steers)
            await self.services.watch.settle(
                self.sightings, self.request_id, self.principal.key_id, steered=steered
            )
        await self.services.conduct.answered(self)
        return await self.services.audit.append(entry, self.content)

    @property
    def recording(self) -> bool:
        """True once an entry is in the log or on its way; False again when that failed."""
        task = self._recording
        if task is None:
            return False
        return not task.done() or (not task.cancelled() and task.exception() is None)

    async def settle(self) -> None:
        """Wait for an entry that is on its way."""
        if self._recording is not None:
            await asyncio.wait({self._recording})

    def note(self) -> wire.Note:
        """Our own part of the answer, with the receipt if there is one."""
        audited = judged = None
        if self.receipt is not None:
            audited = wire.Audited(self.receipt.index, self.receipt.leaf_hash)
        if self.verdict is not None:
            scores = {name: score.score for name, score in self.verdict.strongest().items()}
            judged = wire.Judged(self.verdict.action, self.verdict.detector, scores)
        return wire.Note(self.request_id, audited, judged)

    async def release(self) -> None:
        """Give back the place, stop the engine. Safe to call twice."""
        await self.resources.aclose()
