"""From logits to answers: park after the prompt, fork into ``n``, choose, end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.detokenizer import Detokenizer
from fortpoint.engine.kv_cache import KVCache
from fortpoint.engine.protocol import Done, Finished, FinishReason, Generate, Prefilled, Token
from fortpoint.engine.sampler import generator, sample
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Answer, Sequence
from fortpoint.types import Reading, Usage


class Answers:
    """Carries generations from their prompt's end to their last token."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        scheduler: Scheduler,
        max_context: int,
        new_cache: Callable[[], KVCache],
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._max_context = max_context
        self._new_cache = new_cache

    def advance(self, sequence: Sequence, logits: Tensor, reading: Reading | None) -> None:
        """``logits`` ``[vocab]`` follow all of the sequence's tokens."""
        if sequence.answer is not None:
            self._choose(sequence, sequence.answer, logits)
            return
        job, request = sequence.job, _generate_of(sequence)
        sequence.first_logits = logits.clone()
        job.send(Prefilled(request.id, job.n_prompt_tokens, reading))
        sequence.parked = request.hold and not job.proceeding
        if not sequence.parked:
            self.begin(sequence)

    def begin(self, sequence: Sequence) -> None:
        """The prompt is read and may be answered: fork into ``n`` and choose first tokens."""
        if sequence.first_logits is None:
            return
        logits, sequence.first_logits, sequence.parked = sequence.first_logits, None, False
        sampling = _generate_of(sequence).sampling
        sequence.job.n_open = sampling.n
        forks = [self._fork(sequence, index) for index in range(1, sampling.n)]
        for answering in (sequence, *forks):
            source = generator(sampling.seed, answering.index)
            text = Detokenizer(self._tokenizer.decode, sampling.stop)
            answering.answer = Answer(sampling, source, text)
            self._choose(answering, answering.answer, logits)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        fork = replace(
            sequence,
            index=index,
            cache=sequence.cache.fork() or self._new_cache(),
            tokens=list(sequence.tokens),
        )
        self._scheduler.add(fork)
        return fork

    def _choose(self, sequence: Sequence, answer: Answer, logits: Tensor) -> None:
        job, request_id = sequence.job, sequence.job.request.id
        token = sample(logits, answer.sampling, answer.source)
        sequence.tokens.append(token)
        job.n_completion_tokens += 1
        ended = token in self._tokenizer.eos
        text = "" if ended else answer.text.add(token)
        reason = self._reason(sequence, answer, ended=ended)
        if reason is not None:
            text += answer.text.finish()
        # One event a token, with or without text: whoever meters counts events as they come.
        job.send(Token(request_id, sequence.index, text))
        if reason is not None:
            job.send(Finished(request_id, sequence.index, reason))
            self._scheduler.remove(sequence)
            job.n_open -= 1
        if job.n_open == 0:
            usage = Usage(job.n_prompt_tokens, job.n_completion_tokens)
            job.send(Done(request_id, usage), last=True)

    def _reason(self, sequence: Sequence, answer: Answer, *, ended: bool) -> FinishReason | None:
        if ended or answer.text.stopped:
            return "stop"
        full = len(sequence.tokens) >= self._max_context
        return "length" if full or sequence.n_answer >= answer.sampling.max_tokens else None


def _generate_of(sequence: Sequence) -> Generate:
    request = sequence.job.request
    if not isinstance(request, Generate):
        raise TypeError("only a generation has answers")
    return request
