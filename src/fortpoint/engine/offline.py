"""An engine without a socket: answers and scores many requests at once, in the caller's thread.

For measurements on the operator's own account; nobody is guarded or recorded here.

    engine = Offline(model, tokenizer, library, config)
    answers = engine.answer([Generate("1", Sampling(60), messages=..., hold=False, read=False)])
    engine.stream.read(...)  # the same model, between two calls
    engine.close()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fortpoint.config import Engine
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.intake import Intake
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.model import Model
from fortpoint.engine.protocol import Event, Failed, Generate, Scored, ScoreText, Token
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.engine.runner import Runner
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Job, Sent
from fortpoint.engine.taps import Taps
from fortpoint.errors import EngineError, SteeringDiverged
from fortpoint.features.library import Library

Told = Callable[[int], object]
"""How many requests have ended."""


class Offline:
    """One model, one thread: whoever calls."""

    def __init__(
        self, model: Model, tokenizer: ChatTokenizer, library: Library, config: Engine
    ) -> None:
        self.model = model
        self.library = library
        self.tokenizer = tokenizer
        self.stream = ResidualStream(model)
        taps = Taps(library, LinearProbes.none(model.d_model))
        # All requests of a call may wait: they are here already.
        self._scheduler = Scheduler(
            config.max_batch, config.prefill_chunk, 1 << 20, model.max_context
        )
        self._events: dict[str, list[Event]] = {}
        self._runner = Runner(model, tokenizer, taps, self._scheduler, self._deliver)
        self._intake = Intake(tokenizer, model.max_context, library, taps, {}, None)

    def answer(
        self, requests: Sequence[Generate], told: Told = lambda n_ended: None
    ) -> list[str | None]:
        """Each request's text; None where its steering broke the activations.

        Requests have different ids, ``hold`` False and ``n`` 1. Raises what a request is
        refused with, and ``EngineError`` for one that failed otherwise.
        """
        self._run(requests, told)
        return [_text(self._events.pop(request.id)) for request in requests]

    def score(
        self, requests: Sequence[ScoreText], told: Told = lambda n_ended: None
    ) -> list[NDArray[np.float64]]:
        """Log-probability of each token of each continuation. Raises as ``answer`` does."""
        self._run(requests, told)
        return [_logprobs(self._events.pop(request.id)) for request in requests]

    def close(self) -> None:
        """End what the runner started; the model is whoever's who made it."""
        self._runner.start()  # only what runs can be stopped
        self._runner.stop()

    def _run(self, requests: Sequence[Generate] | Sequence[ScoreText], told: Told) -> None:
        self._events = {request.id: [] for request in requests}
        for request in requests:
            job = Job(request)
            self._intake.prepare(job)
            self._runner.submit(job)
        n_ended = 0
        busy = True
        while busy:
            self._runner.obey(wait=False)
            busy = self._runner.step()
            n_left = len(self._scheduler.running) + len(self._scheduler.waiting)
            if len(requests) - n_left > n_ended:
                n_ended = len(requests) - n_left
                told(n_ended)

    def _deliver(self, sent: list[Sent]) -> None:
        for job, event in sent:
            self._events[job.request.id].append(event)


def _text(events: Sequence[Event]) -> str | None:
    try:
        _check(events)
    except SteeringDiverged:
        return None
    return "".join(event.text for event in events if isinstance(event, Token))


def _logprobs(events: Sequence[Event]) -> NDArray[np.float64]:
    _check(events)
    (scored,) = (event for event in events if isinstance(event, Scored))
    return np.array(scored.logprobs, np.float64)


def _check(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Failed):
            kind = SteeringDiverged if event.code == SteeringDiverged.code else EngineError
            raise kind(event.message)
