"""The peers as contestants: what each is started with, and a process that does jobs.

All stay alive between their turns and are stopped (SIGSTOP) while another is measured, so that
turns can alternate and nobody's idle threads take the cores.

    peer = Peer(config, python, log)
    peer.start()                       # loads its model; minutes for one that compiles
    run = peer.measure(prompts, concurrency=8, max_tokens=128)
    peer.stop()
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from peers.prompts import Prompt

START_LIMIT_S = 900
JOB_LIMIT_S = 600


class Failed(Exception):
    """A peer did not start, died, took too long, or made fewer tokens than asked for."""


@dataclass(frozen=True)
class Run:
    """One job: wall-clock seconds and how many tokens were made."""

    seconds: float
    n_tokens: int


@dataclass(frozen=True)
class Config:
    """One way to run a peer; the best of a ``family`` counts."""

    family: str
    variant: str
    environment: str
    settings: dict[str, object]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.variant}"


def configs(model: Path, q4_1: Path, q8_0: Path, cores: int) -> list[Config]:
    """Every way that is tried."""
    found = [
        Config("transformers", "bf16", "transformers", {"model": str(model), "threads": cores})
    ]
    for eager in (True, False):
        for threads in range(1, cores + 1) if cores <= 2 else (1, cores):
            found.append(
                Config(
                    "vLLM",
                    f"bf16, {'eager' if eager else 'compiled'}, OMP_NUM_THREADS={threads}",
                    "vllm",
                    {"model": str(model), "eager": eager},
                    {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"},
                )
            )
    for name, file in (("Q4_1", q4_1), ("Q8_0", q8_0)):
        for poll in (50, 0):
            settings = {"gguf": str(file), "threads": cores, "context": 1024, "poll": poll}
            found.append(Config(f"llama.cpp {name}", f"poll {poll}", "llama_cpp", settings))
    return found


class Peer:
    """A runner in its own environment and process group."""

    def __init__(self, config: Config, python: Path, log: Path) -> None:
        self.config = config
        self.name = config.name
        self.versions: dict[str, str] = {}
        self._python = python
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ``Failed``."""
        runner = Path(__file__).with_name(f"run_{self.config.environment}.py")
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, runner, json.dumps(self.config.settings)],
                env={**os.environ, **offline, **self.config.variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.versions = self._answer(START_LIMIT_S)["versions"]
        self._signal(signal.SIGSTOP)

    def measure(self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int) -> Run:
        """``concurrency`` requests at once, wave after wave. Raises ``Failed``."""
        job = {
            "prompts": [prompt.tokens for prompt in prompts],
            "concurrency": concurrency,
            "max_tokens": max_tokens,
        }
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answer(JOB_LIMIT_S)
        except OSError as error:
            raise Failed(f"{self.name} died; see {self._log}") from error
        finally:
            self._signal(signal.SIGSTOP)
        if answer["n_tokens"] != len(prompts) * max_tokens:
            raise Failed(f"{self.name} made {answer['n_tokens']} tokens")
        return Run(answer["seconds"], answer["n_tokens"])

    @property
    def running(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """End it and its children. Safe to call twice."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None

    def _answer(self, limit_s: float) -> dict:
        """The next line of the runner: one job, one line."""
        output = self._process.stdout
        if not select.select([output], [], [], limit_s)[0]:
            raise Failed(f"{self.name} took more than {limit_s} s")
        line = output.readline()
        if not line:
            raise Failed(f"{self.name} ended; see {self._log}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
