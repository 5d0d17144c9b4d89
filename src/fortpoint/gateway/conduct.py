"""From scores to what is done: the policy, the conversation and the account behind a prompt.

    verdict = conduct.answer_verdict(exchange, scores)              # while an answer grows
    verdict = await conduct.prompt_verdict(exchange, messages, found, attempt=True)

For a prompt, in this order:

1. what its conversation adds: a crescendo is one more score
2. the policy decides over all scores
3. where it escalates, the second stage says; what it costs is in the record
4. the conversation's state is kept; the account takes note, and may be closed by it

Whatever breaks here refuses the request with ``guard_failed``. What was only scored (moderations,
embeddings) is no attempt: it raises no risk, but is remembered as near-duplicate. An answer
waits for no second stage: there ``escalate`` is what ``on_failure`` says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fortpoint.audit.entry import PolicyUse, Stage
from fortpoint.errors import GuardFailed
from fortpoint.guard import policy as policies
from fortpoint.guard.account import suspicion
from fortpoint.guard.account_desk import AccountDesk
from fortpoint.guard.asking import Sender, asked_by
from fortpoint.guard.conversation import (
    DETECTOR,
    THRESHOLD,
    Conversations,
    Place,
    State,
    advance,
    crescendo,
    strange_turns,
)
from fortpoint.guard.policy import Context, Decision, Direction
from fortpoint.guard.policy_file import LoadedPolicy
from fortpoint.guard.second_stage import SecondStage, SecondStageFailed
from fortpoint.types import Action, Message, Role, Score, Turn, Verdict

if TYPE_CHECKING:
    from fortpoint.gateway.exchange import Exchange

SECOND_STAGE: Final = "second_stage"


@dataclass
class Conducted:
    """What one exchange's record says of the policy, as it becomes known."""

    rules: dict[str, None] = field(default_factory=dict)
    shadow: dict[str, None] = field(default_factory=dict)
    shadow_action: str | None = None
    stages: list[Stage] = field(default_factory=list)
    taken: set[bytes] = field(default_factory=set)

    def note(self, decision: Decision) -> None:
        self.rules |= dict.fromkeys(decision.rules)
        if decision.shadow is not None:
            self.shadow |= dict.fromkeys(decision.shadow_rules)
            self.shadow_action = decision.shadow


class Conduct:
    """One policy with what it needs. Without ``desk`` no account is watched."""

    def __init__(
        self,
        loaded: LoadedPolicy,
        desk: AccountDesk | None = None,
        second_stage: SecondStage | None = None,
    ) -> None:
        self.loaded = loaded
        self.desk = desk
        self._second_stage = second_stage
        settings = loaded.policy.conversation
        self._conversations = Conversations(settings) if settings.enabled else None

    def use(self, conducted: Conducted) -> PolicyUse:
        """What the record says of it."""
        return PolicyUse(
            version=self.loaded.version,
            sha256=self.loaded.sha256,
            rules=tuple(conducted.rules),
            shadow=conducted.shadow_action,
            shadow_rules=tuple(conducted.shadow),
            stages=tuple(conducted.stages),
        )

    def answer_verdict(self, exchange: Exchange, scores: Sequence[Score]) -> Verdict:
        """What is done about an answer so far. Raises ``GuardFailed``."""
        decision = self._decided(exchange, scores, "output")
        action = decision.action
        if action == "escalate":
            stage = self.loaded.policy.second_stage
            action = "flag" if stage is not None and stage.on_failure == "open" else "block"
        return Verdict(action, decision.detector, tuple(scores))

    def redacts(self, exchange: Exchange, score: Score) -> bool:
        """Whether what this score found must not leave. Raises ``GuardFailed``."""
        return self._decided(exchange, [score], "output").action == "redact"

    def scored_verdict(self, exchange: Exchange, scores: Sequence[Score]) -> Verdict:
        """What would be done about texts that nothing is made from. Raises ``GuardFailed``."""
        decision = self._decided(exchange, scores, "input")
        return Verdict(_of_prompt(decision.action), decision.detector, tuple(scores))

    async def prompt_verdict(
        self, exchange: Exchange, messages: Sequence[Message], found: Verdict, *, attempt: bool
    ) -> Verdict:
        """What is done about a prompt, whose detectors ``found`` this.

        Raises ``GuardFailed``, ``AccountSuspended``, ``AccountUnderReview``,
        ``AuditUnavailable`` and ``StorageError``.
        """
        place = self._place(exchange, messages) if attempt else None
        new = _new_turns(found, place)
        scores, keep = self._with_crescendo(place, new, found.scores)
        decision = self._decided(exchange, scores, "input")
        verdict = Verdict(_of_prompt(decision.action), decision.detector, scores)
        if decision.action == "escalate":
            verdict = await self._escalated(exchange, messages, verdict)
        now = time.time()
        if self._conversations is not None and place is not None:
            if verdict.action == "block":
                self._conversations.refuse(place, now)
            else:
                self._conversations.keep(place, keep, now)
        await self._observed(exchange, messages, place, new, verdict, attempt=attempt)
        return verdict

    async def answered(self, exchange: Exchange) -> None:
        """Take note of an answer that was cut: an attack that got past the prompt's judgement.

        Raises ``AuditUnavailable`` and ``StorageError``.
        """
        principal = exchange.principal
        cut = exchange.verdict is not None and "content_filter" in exchange.finish_reasons
        if self.desk is None or principal is None or exchange.verdict is None or not cut:
            return
        asked = asked_by(
            Sender(principal.key_id, principal.user),
            time.time(),
            exchange.request_id,
            [],
            exchange.verdict.scores,
            "block",
            self.desk.sketcher,
        )
        await self.desk.observe(asked, logprobs=False, attempt=True, exempt=True)

    def _decided(
        self, exchange: Exchange, scores: Sequence[Score], direction: Direction
    ) -> Decision:
        principal, model = exchange.principal, exchange.model
        context = Context(
            direction,
            None if principal is None else principal.key_id,
            None if principal is None else principal.user,
            None,
            None if model is None else model.model,
        )
        try:
            decision = policies.decide(self.loaded.policy, scores, context)
        except Exception:  # noqa: BLE001 - whatever broke in the policy must close the gate
            raise GuardFailed(
                "the guard's policy could not be applied, so the request was not answered; try "
                "again"
            ) from None
        exchange.conducted.note(decision)
        return decision

    def _place(self, exchange: Exchange, messages: Sequence[Message]) -> Place | None:
        if self._conversations is None or exchange.principal is None:
            return None
        return self._conversations.follow(exchange.principal.key_id, messages, time.time())

    def _with_crescendo(
        self, place: Place | None, new: Sequence[Turn], scores: tuple[Score, ...]
    ) -> tuple[tuple[Score, ...], State]:
        """The scores with what the conversation adds, and its state after these turns."""
        if place is None:
            return scores, State()
        settings = self.loaded.policy.conversation
        state = advance(place.state, map(_suspicions, new), settings)
        sure = crescendo(state, settings)
        if not sure:
            return scores, state
        score = Score(DETECTOR, round(sure, 6), THRESHOLD, Role.USER, sure >= THRESHOLD)
        return (*scores, score), state

    async def _escalated(
        self, exchange: Exchange, messages: Sequence[Message], verdict: Verdict
    ) -> Verdict:
        """What the second stage says; a flag says that it was asked."""
        settings = self.loaded.policy.second_stage
        if settings is None or self._second_stage is None:
            raise GuardFailed("the policy escalates and there is no second stage to ask")
        text = "\n\n".join(message.content for message in messages)
        started = time.perf_counter()
        try:
            score = await self._second_stage.ask(text)
        except SecondStageFailed:
            exchange.conducted.stages.append(_stage(SECOND_STAGE, started, "failed"))
            if settings.on_failure == "closed":
                raise
            return Verdict("flag", verdict.detector, verdict.scores)
        unsafe = score >= settings.threshold
        said = Score(SECOND_STAGE, round(score, 6), settings.threshold, Role.USER, unsafe)
        exchange.conducted.stages.append(_stage(SECOND_STAGE, started, "ok"))
        action: Action = "block" if unsafe else "flag"
        detector = SECOND_STAGE if unsafe else verdict.detector
        return Verdict(action, detector, (*verdict.scores, said))

    async def _observed(
        self,
        exchange: Exchange,
        messages: Sequence[Message],
        place: Place | None,
        new: Sequence[Turn],
        verdict: Verdict,
        *,
        attempt: bool,
    ) -> None:
        """Have the account take note, once for each prompt of an exchange."""
        principal = exchange.principal
        if self.desk is None or principal is None or self._was_taken(exchange, place):
            return
        n_known = 0 if place is None else place.n_known
        texts = [m.content for m in messages[n_known:] if m.role is Role.USER]
        own = [score for turn in new for score in turn.scores]
        asked = asked_by(
            Sender(principal.key_id, principal.user),
            time.time(),
            exchange.request_id,
            texts,
            # Of what passes, only what is new tells of this request.
            own if own and verdict.action == "allow" else verdict.scores,
            verdict.action,
            self.desk.sketcher,
            0 if place is None else strange_turns(place, messages),
        )
        await self.desk.observe(
            asked,
            logprobs=exchange.asks_logprobs,
            attempt=attempt,
            exempt=principal.role == "operator",
        )

    def _was_taken(self, exchange: Exchange, place: Place | None) -> bool:
        """A stream of several prompts judges each of them twice."""
        if place is None:
            return False
        taken = place.after in exchange.conducted.taken
        exchange.conducted.taken.add(place.after)
        return taken


def _new_turns(found: Verdict, place: Place | None) -> Sequence[Turn]:
    """The user's turns that were not met before."""
    if found.turns is msgspec.UNSET or place is None:
        return ()
    return [turn for turn in found.turns if turn.message >= place.n_known]


def _suspicions(turn: Turn) -> dict[str, float]:
    return {score.detector: suspicion(score.score, score.threshold) for score in turn.scores}


def _of_prompt(action: policies.Action) -> Action:
    """A prompt cannot be changed without being another one; what escalates is still open."""
    if action == "escalate":
        return "flag"
    return "block" if action == "redact" else action


def _stage(name: str, started: float, outcome: str) -> Stage:
    return Stage(name, round((time.perf_counter() - started) * 1000, 3), outcome)
