"""Asks the guard and turns its verdict into the next step: on, or a refusal.

Whose word is taken: an operator's key may write its own system prompt, which is then not
judged; a customer's system text is judged like anything else it sends (the guard applies a
stricter threshold to it).

A verdict of ``failed`` is an error of its own and never a pass.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from fortpoint.access.keys import Principal
from fortpoint.errors import ContentBlocked, GuardFailed, Unsupported
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.services import Judge
from fortpoint.types import Message, Reading, Role, Score, Verdict

_TRUSTED_BY_OPERATOR = frozenset({Role.SYSTEM})
_IN_LINE_CHARACTERS = 8192
_SEVERITY = {"allow": 0, "block": 1, "failed": 2}


async def decide(
    exchange: Exchange, messages: Sequence[Message], reading: Reading | None, param: str
) -> None:
    """Let the exchange go on or raise ``ContentBlocked`` or ``GuardFailed``."""
    verdict = await require(exchange, messages, reading)
    if verdict.action != "allow":
        raise ContentBlocked(_reason(verdict), param=param)


async def require(
    exchange: Exchange, messages: Sequence[Message], reading: Reading | None
) -> Verdict:
    """A verdict of allow or block, noted on the exchange. Raises ``GuardFailed``."""
    verdict = await judge(exchange, messages, reading)
    if verdict.action == "failed":
        raise GuardFailed(
            f"the detector {verdict.detector or 'unknown'} failed, so the request was not "
            "answered; try again"
        )
    return verdict


async def judge(
    exchange: Exchange, messages: Sequence[Message], reading: Reading | None
) -> Verdict:
    """The verdict on these messages, noted on the exchange. Raises ``Unsupported`` when off."""
    guard = exchange.services.guard
    if guard is None:
        raise Unsupported("the guard is turned off on this server")
    exchange.detectors = guard.detectors
    started = time.perf_counter()
    if exchange.services.config.guard.probes and (reading is None or not reading.probes):
        # Text alone would be a weaker guard than the one that was asked for.
        verdict = Verdict("failed", "probes", ())
    else:
        verdict = await _ask(guard, messages, reading, trusted_roles(exchange.principal))
    exchange.services.meter.judged(time.perf_counter() - started)
    exchange.verdict = verdict if exchange.verdict is None else join(exchange.verdict, verdict)
    return verdict


def trusted_roles(principal: Principal | None) -> frozenset[Role]:
    if principal is not None and principal.role == "operator":
        return _TRUSTED_BY_OPERATOR
    return frozenset()


def join(first: Verdict, second: Verdict) -> Verdict:
    """One verdict for several prompts: the graver action, each detector's highest score."""
    graver = max(first, second, key=lambda verdict: _SEVERITY[verdict.action])
    highest: dict[str, Score] = {}
    for score in (*first.scores, *second.scores):
        known = highest.get(score.detector)
        if known is None or (score.flagged, score.score) > (known.flagged, known.score):
            highest[score.detector] = score
    return Verdict(graver.action, graver.detector, tuple(highest.values()))


async def _ask(
    guard: Judge,
    messages: Sequence[Message],
    reading: Reading | None,
    trusted: frozenset[Role],
) -> Verdict:
    """Long texts are judged in a thread, so that other requests' tokens keep flowing."""
    try:
        if sum(len(message.content) for message in messages) <= _IN_LINE_CHARACTERS:
            return guard.judge(messages, reading, trusted)
        return await asyncio.to_thread(guard.judge, messages, reading, trusted)
    except Exception:  # noqa: BLE001 - whatever broke in the guard must close the gate
        return Verdict("failed", None, ())


def _reason(verdict: Verdict) -> str:
    detector = verdict.detector or "guard"
    scores = [score.score for score in verdict.scores if score.detector == detector]
    scored = f" (score {max(scores):.2f})" if scores else ""
    return f"the input was refused by the detector {detector}{scored}"
