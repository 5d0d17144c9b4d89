"""From logits to answers: park after the prompt, fork into ``n``, choose, end.

Every token is one event, with or without text: whoever meters counts events as they come. What
a ``stop_when`` ends may still have text that was held back for a stop string; it leaves in an
event of its own, which counts as one more.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.detokenizer import Detokenizer
from fortpoint.engine.model import Cache, Floats
from fortpoint.engine.passes import Computed, Pass
from fortpoint.engine.protocol import Done, Finished, FinishReason, Generate, Prefilled, Token
from fortpoint.engine.sampler import Chosen, Sampler, choose
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Answer, Job, Sequence
from fortpoint.engine.taps import FeaturePart, Part, Taps
from fortpoint.errors import FortPointError
from fortpoint.types import Usage

_KEPT_TEXTS = 8192


class Answers:
    """Carries generations from their prompt's end to their last token.

    ``end`` frees all that a job has in the scheduler; ``wait`` returns once the last pass's parts
    hold what was read.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        scheduler: Scheduler,
        taps: Taps,
        max_context: int,
        new_cache: Callable[[], Cache],
        end: Callable[[Job], None],
        wait: Callable[[], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._taps = taps
        self._max_context = max_context
        self._new_cache = new_cache
        self._end = end
        self._wait = wait
        self._unread: list[tuple[Token, Part, bool]] = []
        self._text_of = lru_cache(_KEPT_TEXTS)(lambda token: tokenizer.decode((token,)))

    def advance(self, done: Pass, ready: Many[Computed]) -> None:
        """All tokens of ``ready``'s sequences are computed: what comes next?"""
        choosing: list[Computed] = []
        for computed in ready:
            sequence = computed.work.sequence
            if sequence.answer is None:
                self._prefilled(sequence, done.logits[computed.logits.start])
            elif computed.stopped:
                self._stop(sequence, sequence.answer)
            else:
                choosing.append(computed)
        if choosing:
            rows = [computed.logits.start for computed in choosing]
            logits = _rows(done.logits, rows)
            self._choose([c.work.sequence for c in choosing], logits, done.likeliest[rows])

    def begin(self, sequence: Sequence) -> None:
        """The prompt is read and may be answered: fork into ``n`` and choose first tokens."""
        if sequence.first_logits is None:
            return
        logits, sequence.first_logits, sequence.parked = sequence.first_logits, None, False
        sampling = _generate_of(sequence).sampling
        sequence.job.n_open = sampling.n
        forks = [self._fork(sequence, index) for index in range(1, sampling.n)]
        answering = [sequence, *forks]
        for one in answering:
            one.answer = self._answer(one)
        likeliest = np.full(sampling.n, logits.argmax())
        self._choose(answering, np.broadcast_to(logits, (sampling.n, len(logits))), likeliest)

    def drop(self, job: Job, choice: int) -> None:
        """Nobody wants this answer any more: free its place, let the others go on."""
        for sequence in self._scheduler.of(job):
            if sequence.index == choice and sequence.answer is not None:
                self._finish(sequence, "cancelled")

    def _prefilled(self, sequence: Sequence, logits: Floats) -> None:
        job, request = sequence.job, _generate_of(sequence)
        reading = None
        if request.read or request.watch is not None:
            reading = self._taps.reading(sequence.read, sequence.prompt.segments)
        sequence.read = [Part(sequence.logits_read())]  # features have left
        sequence.first_logits = logits.copy()
        job.send(Prefilled(request.id, job.n_prompt_tokens, reading))
        sequence.parked = request.hold and not job.proceeding
        if not sequence.parked:
            self.begin(sequence)

    def _answer(self, sequence: Sequence) -> Answer:
        sampling, compiled = _generate_of(sequence).sampling, sequence.job.grammar
        grammar = None if compiled is None else compiled.fork()
        sampler = Sampler(sampling, sequence.index, sequence.prompt.tokens, grammar)
        return Answer(sampler, Detokenizer(self._tokenizer.decode, sampling.stop), grammar)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        fork = replace(
            sequence,
            index=index,
            cache=sequence.cache.fork() or self._new_cache(),
            tokens=list(sequence.tokens),
            read=list(sequence.read),
        )
        self._scheduler.add(fork)
        return fork

    def _choose(
        self, sequences: Many[Sequence], logits: Floats, likeliest: NDArray[np.intp]
    ) -> None:
        """``logits`` ``[n, vocab]`` follow all of each sequence's tokens."""
        answers = [_answer_of(sequence) for sequence in sequences]
        chosen = choose(logits, [answer.sampler for answer in answers], likeliest)
        for sequence, answer, choice in zip(sequences, answers, chosen, strict=True):
            if sequence.job.ended:  # by another of its answers, a moment ago
                continue
            if isinstance(choice, FortPointError):
                sequence.job.fail(choice)
                self._end(sequence.job)
            else:
                self._add(sequence, answer, choice)

    def _add(self, sequence: Sequence, answer: Answer, chosen: Chosen) -> None:
        job, token = sequence.job, chosen.token
        sequence.tokens.append(token)
        job.n_completion_tokens += 1
        ended = token in self._tokenizer.eos
        text = "" if ended else answer.text.add(token)
        reason = self._reason(sequence, answer, ended=ended)
        if reason is not None:
            text += answer.text.finish()
        job.send(self._event(sequence, text, chosen))
        if reason is not None:
            self._finish(sequence, reason)

    def _stop(self, sequence: Sequence, answer: Answer) -> None:
        if text := answer.text.held:
            sequence.job.n_completion_tokens += 1
            sequence.job.send(Token(sequence.job.request.id, sequence.index, text))
        self._finish(sequence, "stop_when")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        job, request_id = sequence.job, sequence.job.request.id
        job.send(Finished(request_id, sequence.index, reason))
        if job.shares_answer:
            self._wait()
            sequence.publish(sequence.cache.length)
        self._scheduler.remove(sequence)
        job.n_open -= 1
        if job.n_open == 0:
            usage = Usage(job.n_prompt_tokens, job.n_completion_tokens)
            job.send(Done(request_id, usage), last=True)

    def _reason(self, sequence: Sequence, answer: Answer, *, ended: bool) -> FinishReason | None:
        if ended or answer.text.stopped or (answer.grammar is not None and answer.grammar.done):
            return "stop"
        full = len(sequence.tokens) >= self._max_context
        most = answer.sampler.sampling.max_tokens
        return "length" if full or sequence.n_answer >= most else None

    def _event(self, sequence: Sequence, text: str, chosen: Chosen) -> Token:
        request = _generate_of(sequence)
        if chosen.logprob is None:
            event = Token(request.id, sequence.index, text)
        else:
            top = tuple((self._text_of(token), logprob) for token, logprob in chosen.top or ())
            token = self._text_of(chosen.token)
            event = Token(request.id, sequence.index, text, token, chosen.logprob, top)
        if sequence.newest is not None and (request.read or request.watch is not None):
            self._unread.append((event, sequence.newest, request.watch is not None))
        return event

    def fill(self) -> None:
        """Put into the events what was read where their tokens were chosen."""
        if not self._unread:
            return
        self._wait()
        for event, part, watched in self._unread:
            if watched:
                reading = self._taps.reading([_last_row(part)])
            else:
                reading = self._taps.last_token(part)
            # Nobody has seen the event yet.
            msgspec.structs.force_setattr(event, "reading", reading)
        self._unread.clear()


def _rows(logits: Floats, rows: list[int]) -> Floats:
    """These rows, without a copy where they are the first ones (as they nearly always are)."""
    return logits[: len(rows)] if rows == list(range(len(rows))) else logits[rows]


def _last_row(part: Part) -> Part:
    features = tuple(
        FeaturePart(read.dictionary, read.indices[-1:], read.values[-1:]) for read in part.features
    )
    return Part(part.logits[-1:], features)


def _generate_of(sequence: Sequence) -> Generate:
    request = sequence.job.request
    if not isinstance(request, Generate):
        raise TypeError("only a generation has answers")
    return request


def _answer_of(sequence: Sequence) -> Answer:
    if sequence.answer is None:
        raise TypeError("this sequence has not begun to answer")
    return sequence.answer
