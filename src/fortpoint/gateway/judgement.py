"""Asks the guard and turns its scores into the next step: on, or a refusal, or a cut.

Whose word is taken: an operator's key may write its own system prompt, which is then not
judged; a customer's system text is judged like anything else it sends (the guard applies a
stricter threshold to it).

    decide      a prompt, before its first token: on, or ``ContentBlocked``
    require     the same as a verdict, for those who asked for one
    observe     texts that nothing is generated from: noted in the record, never refused
    review      an answer, while it grows: ``hold_back.py`` does what the verdict says

``conduct.py`` is the one place where scores become an action. A verdict of ``failed`` is an
error of its own and never a pass.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from fortpoint.access.keys import Principal
from fortpoint.errors import ContentBlocked, GuardFailed, Unsupported
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.services import AnswerJudge, Judge
from fortpoint.types import Action, Message, Reading, Review, Role, Score, Verdict, rank

_T = TypeVar("_T")

_TRUSTED_BY_OPERATOR = frozenset({Role.SYSTEM})
_IN_LINE_CHARACTERS = 8192
_IN_LINE_TEXTS = 8
_SEVERITY: Final[dict[Action, int]] = {
    "allow": 0,
    "flag": 1,
    "redact": 2,
    "block": 3,
    "failed": 4,
}


async def decide(
    exchange: Exchange, messages: Sequence[Message], reading: Reading | None, param: str
) -> None:
    """Let the exchange go on or raise ``ContentBlocked`` or ``GuardFailed``."""
    verdict = await require(exchange, messages, reading, attempt=True)
    if verdict.action == "block":
        raise ContentBlocked(_reason(verdict), param=param)


async def require(
    exchange: Exchange,
    messages: Sequence[Message],
    reading: Reading | None,
    *,
    attempt: bool = False,
) -> Verdict:
    """The verdict on these messages, noted on the exchange; with ``attempt`` they are to be
    answered. Raises ``GuardFailed``, ``Unsupported`` when the guard is off, and what
    ``conduct.py`` raises."""
    guard = exchange.services.guard
    if guard is None:
        raise Unsupported("the guard is turned off on this server")
    if exchange.services.config.guard.probes and (reading is None or not reading.probes):
        # Text alone would be a weaker guard than the one that was asked for.
        raise _failure(exchange, Verdict("failed", "probes", ()))
    found = await _judged(exchange, guard, messages, reading)
    conduct = exchange.services.conduct
    try:
        verdict = await conduct.prompt_verdict(exchange, messages, found, attempt=attempt)
    except GuardFailed:
        note(exchange, Verdict("failed", found.detector, found.scores))
        raise
    note(exchange, verdict)
    return verdict


async def observe(exchange: Exchange, texts: Sequence[Sequence[Message]]) -> None:
    """Note what the guard says of texts that nothing is generated from, by their words alone.

    What it would refuse in a prompt is a flag here. Raises ``GuardFailed``; does nothing where
    the guard is off.
    """
    guard = exchange.services.guard
    if guard is None:
        return
    for messages in texts:
        found = await _judged(exchange, guard, messages, None, n_texts=len(texts))
        verdict = exchange.services.conduct.scored_verdict(exchange, found.scores)
        action: Action = "flag" if verdict.action in ("redact", "block") else verdict.action
        note(exchange, Verdict(action, verdict.detector, verdict.scores))


def begin_answer(exchange: Exchange, probes: Sequence[str] | None) -> AnswerJudge | None:
    """What judges one answer; None where answers are not judged. Raises ``GuardFailed``."""
    guard = exchange.services.guard
    if guard is None or not exchange.services.config.guard.answers:
        return None
    return _closing(exchange, lambda: guard.answer(probes))


def review(exchange: Exchange, answer: AnswerJudge, *, final: bool) -> tuple[Review, Verdict]:
    """What is known of an answer, and what is to be done. Raises ``GuardFailed``."""
    reviewed = _closing(exchange, lambda: answer.review(final=final))
    return reviewed, exchange.services.conduct.answer_verdict(exchange, reviewed.scores)


def note(exchange: Exchange, verdict: Verdict) -> None:
    """Join this verdict to what the exchange's record says."""
    known = exchange.verdict
    exchange.verdict = verdict if known is None else join(known, verdict)


def trusted_roles(principal: Principal | None) -> frozenset[Role]:
    if principal is not None and principal.role == "operator":
        return _TRUSTED_BY_OPERATOR
    return frozenset()


def join(first: Verdict, second: Verdict) -> Verdict:
    """One verdict for several texts: the graver action, each detector's highest score of each
    role."""
    graver = max(first, second, key=lambda verdict: _severity(verdict.action))
    highest: dict[tuple[str, Role], Score] = {}
    for score in (*first.scores, *second.scores):
        place = score.detector, score.role
        highest[place] = max(highest.get(place, score), score, key=rank)
    return Verdict(graver.action, graver.detector, tuple(highest.values()))


def _severity(action: Action) -> int:
    return _SEVERITY[action]


async def _judged(
    exchange: Exchange,
    guard: Judge,
    messages: Sequence[Message],
    reading: Reading | None,
    n_texts: int = 1,
) -> Verdict:
    """What the guard says, as this exchange takes it. Raises ``GuardFailed``.

    Long texts and many are judged in a thread, so that other requests' tokens keep flowing.
    """
    exchange.detectors = guard.detectors
    started = time.perf_counter()
    trusted = trusted_roles(exchange.principal)
    n_characters = sum(len(message.content) for message in messages)
    try:
        if n_characters <= _IN_LINE_CHARACTERS and n_texts <= _IN_LINE_TEXTS:
            verdict = guard.judge(messages, reading, trusted)
        else:
            verdict = await asyncio.to_thread(guard.judge, messages, reading, trusted)
    except Exception:  # noqa: BLE001 - whatever broke in the guard must close the gate
        verdict = Verdict("failed", None, ())
    exchange.services.meter.judged(time.perf_counter() - started)
    if verdict.action == "failed":
        raise _failure(exchange, verdict)
    return verdict


def _closing(exchange: Exchange, step: Callable[[], _T]) -> _T:
    """The step's result; whatever it raises is a failed guard."""
    try:
        return step()
    except Exception:  # noqa: BLE001 - whatever broke in the guard must close the gate
        raise _failure(exchange, Verdict("failed", None, ())) from None


def _failure(exchange: Exchange, verdict: Verdict) -> GuardFailed:
    note(exchange, verdict)
    return GuardFailed(
        f"the detector {verdict.detector or 'unknown'} failed, so the request was not "
        "answered; try again"
    )


def _reason(verdict: Verdict) -> str:
    detector = verdict.detector or "guard"
    scores = [score.score for score in verdict.scores if score.detector == detector]
    scored = f" (score {max(scores):.2f})" if scores else ""
    return f"the input was refused by the detector {detector}{scored}"
