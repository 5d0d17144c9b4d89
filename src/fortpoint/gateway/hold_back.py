"""The tokens of an answer that wait to be judged: they leave once what follows them is clean.

    ready = hold_back.take(event)          # what may leave now, in order; often nothing

At most ``guard.hold_back_tokens`` wait (16): whenever so many do, the answer is judged up to its
newest token and the older half of them leaves. The end of the answer judges and frees the rest.
A verdict against it drops everything that waits and ends the choice with ``content_filter``:
text, log-probabilities and features of what was not sent stay here. What a rule has found leaves
as ``[redacted]``, and so long as a rule cannot tell yet whether something is a secret, it waits
beyond that number.

With a stop string, a token's text lags behind the token itself by up to that string's length.
Where log-probabilities show tokens, those near something that was found are therefore shown
without them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fortpoint.engine.protocol import Finished, Token
from fortpoint.gateway import judgement
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.services import AnswerJudge
from fortpoint.types import Found, Review, Verdict

REDACTED = "[redacted]"

Event = Token | Finished


@dataclass(frozen=True)
class _Waiting:
    """A token and which characters of the answer it brings."""

    token: Token
    start: int
    end: int


class HoldBack:
    """One choice. ``lag`` is how many characters a token's text may lag behind it."""

    def __init__(self, exchange: Exchange, answer: AnswerJudge, lag: int = 0) -> None:
        self.ended = False
        self._exchange = exchange
        self._answer = answer
        self._lag = lag
        self._most = exchange.services.config.guard.hold_back_tokens
        self._trailing = self._most // 2
        self._waiting: deque[_Waiting] = deque()
        self._n_characters = 0
        self._n_unjudged = 0
        self._due = self._most

    def take(self, event: Event) -> Sequence[Event]:
        """What may leave after this event. Raises ``GuardFailed``."""
        if self.ended:
            return ()
        if isinstance(event, Finished):
            return self._judge(event)
        start = self._n_characters
        self._n_characters += len(event.text)
        self._answer.add(event.text, event.reading)
        self._waiting.append(_Waiting(event, start, self._n_characters))
        self._n_unjudged += 1
        return self._judge(None) if self._n_unjudged >= self._due else ()

    def _judge(self, end: Finished | None) -> Sequence[Event]:
        self._n_unjudged, self._due = 0, self._most - self._trailing
        review, verdict = judgement.review(self._exchange, self._answer, final=end is not None)
        if verdict.action == "block":
            last = end or self._waiting[-1].token
            self._waiting.clear()
            return self._end(verdict, Finished(last.id, last.choice, "content_filter"))
        if end is None:
            return self._release(review, self._trailing)
        return [*self._release(review, 0, final=True), *self._end(verdict, end)]

    def _end(self, verdict: Verdict, end: Finished) -> Sequence[Event]:
        self.ended = True
        judgement.note(self._exchange, verdict)
        return [end]

    def _release(self, review: Review, trailing: int, *, final: bool = False) -> list[Event]:
        """The oldest of what waits, but for so many; nothing that a rule is not sure of."""
        hidden = self._hidden(review)
        ready: list[Event] = []
        while len(self._waiting) > trailing:
            if not final and self._waiting[0].end + self._lag > review.settled:
                break
            shown = self._shown(self._waiting.popleft(), hidden)
            if shown is not None:
                ready.append(shown)
        return ready

    def _hidden(self, review: Review) -> Sequence[Found]:
        """What must not leave of what was found."""
        if not review.found:
            return ()
        redacted = {
            score.detector
            for score in review.scores
            if self._exchange.services.conduct.redacts(self._exchange, score)
        }
        return [found for found in review.found if found.detector in redacted]

    def _shown(self, waiting: _Waiting, hidden: Sequence[Found]) -> Token | None:
        """The token as it leaves: whole, or only what of its text was not found."""
        token, start, end = waiting.token, waiting.start, waiting.end
        near = [f for f in hidden if f.start < end + self._lag and f.end > start - self._lag]
        if not near:
            return token
        text, at = "", start
        for found in near:
            text += token.text[at - start : max(found.start - start, at - start)]
            text += REDACTED if start <= found.start < end else ""
            at = min(max(found.end, at), end)
        text += token.text[at - start :]
        return Token(token.id, token.choice, text) if text else None
