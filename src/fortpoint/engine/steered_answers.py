"""Answers of a model turned this way and that: what ``features.concepts.sweep`` listens to.

model = SteeredAnswers(offline, max_tokens=60)
model.answers(["How do I boil an egg?"], Setting(("golden-gate",), strength=4.0))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.offline import Offline, Told
from fortpoint.engine.protocol import Generate, Sampling, ScoreText, Steer
from fortpoint.features.concepts.sweep import Setting
from fortpoint.types import Message, Role


class SteeredAnswers:
    """Greedy answers of at most ``max_tokens``."""

    def __init__(self, engine: Offline, max_tokens: int, told: Told = lambda n_ended: None) -> None:
        self._engine = engine
        self._sampling = Sampling(max_tokens, temperature=0.0)
        self._told = told
        self._ids = itertools.count()

    def answers(self, questions: Sequence[str], setting: Setting) -> list[str | None]:
        """One each; None where the setting broke the activations. Raises ``InvalidRequest``."""
        steer = tuple(
            Steer(setting.mode, target, setting.strength, setting.scope)
            for target in setting.targets
        )
        requests = [
            Generate(
                id=f"a{next(self._ids)}",
                sampling=self._sampling,
                messages=_messages(question, setting.system),
                read=False,
                hold=False,
                steer=steer,
            )
            for question in questions
        ]
        return self._engine.answer(requests, self._told)

    def nats(self, questions: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float64]]:
        """Negative log-likelihood of each token of each answer to its question, unsteered."""
        found = [np.empty(0) for _ in answers]
        scored = [i for i, answer in enumerate(answers) if answer]
        requests = [
            ScoreText(f"s{next(self._ids)}", answers[i], messages=_messages(questions[i], None))
            for i in scored
        ]
        for i, logprobs in zip(scored, self._engine.score(requests), strict=True):
            found[i] = -logprobs
        return found


def _messages(question: str, system: str | None) -> tuple[Message, ...]:
    own = () if system is None else (Message(Role.SYSTEM, system),)
    return (*own, Message(Role.USER, question))
