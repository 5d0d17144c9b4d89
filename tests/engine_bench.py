"""The engine stepped by hand, on one thread, over a tiny model: the reference or the real one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_model
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.grammar import GrammarCompiler
from fortpoint.engine.intake import Intake
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.model import Adapter
from fortpoint.engine.protocol import (
    Condition,
    Embed,
    Event,
    Failed,
    Finished,
    Generate,
    Prefilled,
    Sampling,
    Scan,
    Scanned,
    ScoreText,
    Steer,
    Token,
    Watch,
)
from fortpoint.engine.runner import Runner
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Job, Sent
from fortpoint.engine.taps import Taps
from fortpoint.errors import FortPointError
from fortpoint.features.directions import Direction
from fortpoint.features.library import Library
from fortpoint.features.sae import Dictionary
from fortpoint.types import Message, Reading, Role
from reference_model import ReferenceAdapter, ReferenceModel

D_MODEL = 64
N_FEATURES = 64
MODELS = ("reference", pytest.param("llama", marks=pytest.mark.model))


def model(kind: str, folder: Path, n_tokens: int, max_context: int) -> Any:
    if kind == "reference":
        return ReferenceModel(n_tokens, max_context)
    from fortpoint.engine import precision
    from fortpoint.engine.llama import Llama

    bytes_per_token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
    return Llama.load(
        folder,
        precision.choose("float32"),
        max_context=max_context,
        kv_bytes=n_tokens * bytes_per_token,
        threads=1,
    )


@functools.cache
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


@functools.cache
def grammars(folder: Path) -> GrammarCompiler:
    return GrammarCompiler((folder / "tokenizer.json").read_bytes(), 259, {tiny_model.EOS})


def library() -> Library:
    """A dictionary at layer 1 and a direction at layer 0, of random numbers."""
    source = np.random.default_rng(11)
    features = Dictionary(
        name="sae",
        layer=1,
        encoder=source.standard_normal((N_FEATURES, D_MODEL), np.float32) / 3,
        bias=np.zeros(N_FEATURES, np.float32),
        threshold=np.zeros(N_FEATURES, np.float32),
        decoder=source.standard_normal((N_FEATURES, D_MODEL), np.float32),
        center=np.zeros(D_MODEL, np.float32),
        training_max=np.full(N_FEATURES, 2.0, np.float32),
        k=None,
    )
    vector = source.standard_normal(D_MODEL, np.float32)
    vector /= np.linalg.norm(vector)
    calm = Direction("calm", "tiny", 0, vector, bias=0.0, training_max=3.0)
    return Library({"sae": features}, {"calm": calm})


def probes() -> LinearProbes:
    W = np.random.default_rng(3).normal(size=(2, 2, D_MODEL)).astype(np.float32)
    return LinearProbes(("a", "b"), (0, 2), W, np.array([0.5, -0.5], np.float32))


class Bench:
    """A runner, its model, and every event that came, by request."""

    def __init__(
        self,
        folder: Path,
        kind: str = "reference",
        *,
        n_tokens: int = 4096,
        max_batch: int = 8,
        chunk: int = 64,
        max_queue: int = 64,
        max_context: int = 512,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.model = model(kind, folder, n_tokens, max_context)
        self.tokenizer = tokenizer(folder)
        self.library = library()
        self.probes = probes()
        taps = Taps(self.library, self.probes)
        self.scheduler = Scheduler(max_batch, chunk, max_queue, self.model.max_context)
        self.batches: list[list[Sent]] = []
        self.events: dict[str, list[Event]] = {}
        self.runner = Runner(self.model, self.tokenizer, taps, self.scheduler, self._deliver)
        known = {"loud": ReferenceAdapter("loud", 0.7)} if adapters is None else adapters
        self.intake = Intake(
            self.tokenizer, self.model.max_context, self.library, taps, known, grammars(folder)
        )

    def _deliver(self, sent: list[Sent]) -> None:
        self.batches.append(sent)
        for job, event in sent:
            self.events[job.request.id].append(event)

    def submit(self, request: Generate | Scan | Embed | ScoreText) -> Job:
        job = Job(request)
        self.events[request.id] = []
        try:
            self.intake.prepare(job)
        except FortPointError as error:
            self.events[request.id].append(Failed(request.id, error.code, error.message))
        else:
            self.runner.submit(job)
        return job

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.runner.obey(wait=False)
            self.runner.step()

    def run(self, max_steps: int = 4000) -> None:
        for _ in range(max_steps):
            self.runner.obey(wait=False)
            if not self.runner.step():
                return
        raise AssertionError("the runner did not come to rest")

    @property
    def n_used(self) -> int:
        """Memory, in the model's own units, that sequences hold."""
        if isinstance(self.model, ReferenceModel):
            return self.model.n_used
        return self.model._pool.n_blocks - self.model._pool.n_available

    def tokens(self, request_id: str, choice: int = 0) -> list[Token]:
        events = self.events[request_id]
        return [e for e in events if isinstance(e, Token) and e.choice == choice]

    def text(self, request_id: str, choice: int = 0) -> str:
        return "".join(token.text for token in self.tokens(request_id, choice))

    def reasons(self, request_id: str) -> list[str]:
        return [e.reason for e in self.events[request_id] if isinstance(e, Finished)]

    def failure(self, request_id: str) -> Failed:
        failed = self.events[request_id][-1]
        assert isinstance(failed, Failed), failed
        return failed

    def reading(self, request_id: str) -> Reading:
        (event,) = (e for e in self.events[request_id] if isinstance(e, Prefilled | Scanned))
        assert event.reading is not None
        return event.reading

    def logits(self, request_id: str) -> np.ndarray:
        return logits_of(self.reading(request_id))


def logits_of(reading: Reading) -> np.ndarray:
    """The probes' ``[n_tokens, 2]``."""
    return np.frombuffer(reading.logits, "<f4").reshape(reading.n_tokens, 2)


def ask(
    request_id: str,
    text: str,
    max_tokens: int = 12,
    temperature: float = 0.0,
    *,
    hold: bool = False,
    read: bool = True,
    tenant: str = "",
    adapter: str | None = None,
    watch: Watch | None = None,
    steer: tuple[Steer, ...] = (),
    stop_when: tuple[Condition, ...] = (),
    **sampling: object,
) -> Generate:
    return Generate(
        request_id,
        Sampling(max_tokens, temperature, **sampling),  # type: ignore[arg-type]
        messages=(Message(Role.USER, text),),
        hold=hold,
        read=read,
        tenant=tenant,
        adapter=adapter,
        watch=watch,
        steer=steer,
        stop_when=stop_when,
    )


def make_folder(place: Path) -> Path:
    torch.set_num_threads(1)  # the matrices are so small that a second thread only waits
    return tiny_model.make(place / "tiny")
