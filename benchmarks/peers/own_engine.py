"""Our engine as a contestant: the real worker process, asked over its socket.

It is started as the supervisor starts it, on a copy of the model whose configuration names no
end of sequence, so that every answer is as long as asked for. ``paused`` between its turns.

    with OwnEngine(folder, model) as engine:
        run = engine.measure(prompts, concurrency=8, max_tokens=128)
        run = engine.ask([engine.request(prompt, 128, taps=False) for prompt in prompts])
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import psutil
import uvloop

from fortpoint import config, errors, supervisor
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import (
    Description,
    Done,
    Generate,
    Sampling,
    Steer,
    Token,
    Watch,
)
from fortpoint.engine.worker import EngineSpec
from fortpoint.vault.model_folder import MANIFEST, write_manifest
from peers.contestants import Failed, Run
from peers.prompts import Prompt

START_LIMIT_S = 120
DICTIONARY = "random"  # as random_taps names it
TOP = 32
PLACES = 33  # 32 streams and one that joins

_T = TypeVar("_T")


@dataclass(frozen=True)
class OwnRun(Run):
    """``cpu_s`` is the engine process's, ``client_cpu_s`` this one's."""

    cpu_s: float
    client_cpu_s: float


def endless(model: Path, target: Path) -> Path:
    """``model`` without an end of sequence, its weights linked, with a manifest of its own."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.name not in {MANIFEST, "config.json"}:
            (target / file.name).hardlink_to(file)
    settings = json.loads((model / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps(settings | {"eos_token_id": []}))
    write_manifest(target, model.name, "a copy for benchmarks", "unknown", 0)
    return target


def start_process(
    folder: Path, model: Path, socket: Path, *, taps: bool
) -> subprocess.Popen[bytes]:
    """The worker; with ``taps`` it has what `random_taps` left in ``folder``."""
    places = max(PLACES, config.Engine().max_batch)
    spec = EngineSpec(
        config=config.Engine(max_batch=places),
        model=str(model),
        socket=str(socket),
        probes=str(folder / "probes") if taps else None,
        parent_pid=os.getpid(),
        features=str(folder / "features") if taps else None,
    )
    command = [sys.executable, "-P", "-m", "fortpoint.engine.worker"]
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return subprocess.Popen(
        [*command, msgspec.json.encode(spec).decode()],
        env=kept | supervisor._environment() | supervisor._ENGINE_MALLOC,
        stdin=subprocess.DEVNULL,
        process_group=0,
    )


class OwnEngine:
    """One engine process and one connection to it."""

    name = "Fort Point"

    def __init__(self, folder: Path, model: Path, *, taps: bool = True) -> None:
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._ids = itertools.count()
        self._paused = False
        socket = folder / f"{'full' if taps else 'bare'}.sock"
        self._process = start_process(folder, model, socket, taps=taps)
        self.client = EngineClient(socket)
        try:
            self.description = self.do(self._ready())
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def do(self, work: Coroutine[object, object, _T]) -> _T:
        """Run ``work`` while the engine runs."""
        self._pause(False)
        return self._loop.run(work)

    def request(
        self, prompt: Prompt, max_tokens: int, *, taps: bool = True, steer: tuple[Steer, ...] = ()
    ) -> Generate:
        """Greedy; with ``taps`` the probes' readings and the strongest features come along."""
        return Generate(
            id=f"r{next(self._ids)}",
            sampling=Sampling(max_tokens, temperature=0.0),
            prompt=prompt.text,
            read=taps,
            hold=False,
            watch=Watch((DICTIONARY,), TOP) if taps else None,
            steer=steer,
        )

    def ask(self, requests: Sequence[Generate]) -> OwnRun:
        """All at once. Raises ``Failed`` when one makes fewer tokens than asked for."""
        return self.do(self._ask([requests]))

    def measure(self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int) -> OwnRun:
        """As a peer does it: waves of ``concurrency``, probes and features on; paused after."""
        requests = [self.request(prompt, max_tokens) for prompt in prompts]
        starts = range(0, len(requests), concurrency)
        run = self.do(self._ask([requests[at : at + concurrency] for at in starts]))
        self.pause()
        return run

    def memory_mb(self) -> tuple[float, float]:
        """Resident now and at most so far, in MB (10^6 bytes)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))

    def pause(self) -> None:
        """Take the cores from it until it is asked again."""
        self._pause(True)

    def stop(self) -> None:
        """End the process."""
        self._pause(False)
        self._loop.run(self.client.close())
        self._loop.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _pause(self, pause: bool) -> None:
        if pause != self._paused:
            self._process.send_signal(signal.SIGSTOP if pause else signal.SIGCONT)
            self._paused = pause

    async def _ready(self) -> Description:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if self._process.poll() is not None:
                raise Failed(f"the engine ended with exit code {self._process.returncode}")
            with contextlib.suppress(errors.EngineUnavailable):
                return await self.client.describe()
            if time.monotonic() > deadline:
                raise Failed("the engine did not start in time")
            await asyncio.sleep(0.05)

    async def _ask(self, waves: Sequence[Sequence[Generate]]) -> OwnRun:
        engine, client = psutil.Process(self._process.pid), psutil.Process()
        cpu, own_cpu, n_tokens = _cpu_s(engine), _cpu_s(client), 0
        start = time.perf_counter()
        for wave in waves:
            n_tokens += sum(await asyncio.gather(*map(self._complete, wave)))
        seconds = time.perf_counter() - start
        return OwnRun(seconds, n_tokens, _cpu_s(engine) - cpu, _cpu_s(client) - own_cpu)

    async def _complete(self, request: Generate) -> int:
        n_events, usage = 0, None
        async with await self.client.generate(request) as stream:
            async for event in stream:
                n_events += isinstance(event, Token)
                usage = event.usage if isinstance(event, Done) else usage
        if usage is None or not n_events == usage.completion == request.sampling.max_tokens:
            raise Failed(f"the engine made {n_events} tokens of {request.sampling.max_tokens}")
        return n_events


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
