"""Who learns: a library in one of its ways, as a process that is stopped between its turns.

learner = Learner(way, python, settings, log)
learner.start()                 # seconds, or a minute for one that compiles
seconds = learner.turn(30)      # so many steps, timed inside
result = learner.finish()       # its FVU on the held-out rows
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peers.contestants import Failed

START_LIMIT_S = 900
TURN_LIMIT_S = 1800
OURS = "Fort Point"
SAELENS = "SAELens"


@dataclass(frozen=True)
class Way:
    """One way to train; the fastest of a ``family`` and ``architecture`` takes part.

    ``beyond`` is one with bfloat16 autocast put around a library's loop that on a CPU has none.
    """

    family: str
    architecture: str
    variant: str
    environment: str
    settings: dict[str, object]

    @property
    def beyond(self) -> bool:
        return self.family != SAELENS and bool(self.settings.get("autocast"))

    @property
    def group(self) -> tuple[str, str, bool]:
        return self.family, self.architecture, self.beyond

    @property
    def name(self) -> str:
        return f"{self.family} {self.architecture}, {self.variant}"


@dataclass(frozen=True)
class Result:
    """On the held-out rows, after the same number of tokens."""

    fvu: float
    l0: float
    n_dead: int


_VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"autocast": False, "compile": False},
    "bf16 autocast": {"autocast": True, "compile": False},
    "fp32, compiled": {"autocast": False, "compile": True},
    "bf16 autocast, compiled": {"autocast": True, "compile": True},
}


def own_ways() -> list[Way]:
    return [
        Way(OURS, kind, "int8 search, fp32 otherwise", "fortpoint", {"architecture": kind})
        for kind in ("batchtopk", "topk")
    ]


def peers_ways() -> list[Way]:
    """Every way that is tried."""
    found = []
    for kind in ("topk", "batchtopk"):
        for family in (SAELENS, "dictionary_learning"):
            for variant, settings in _VARIANTS.items():
                given = {"architecture": kind, "sparse": False, **settings}
                found.append(Way(family, kind, variant, family.lower(), given))
    sparse = {"architecture": "topk", "sparse": True, **_VARIANTS["fp32"]}
    found.append(Way(SAELENS, "topk", "fp32, sparse activations", "saelens", sparse))
    for optimizer in ("adam", "signum"):
        for variant, settings in _VARIANTS.items():
            given = {"optimizer": optimizer, **settings}
            found.append(Way("sparsify", "topk", f"{optimizer}, {variant}", "sparsify", given))
    return found


class Learner:
    """A runner in its own environment and process group."""

    def __init__(self, way: Way, python: Path, settings: dict[str, object], log: Path) -> None:
        self.way = way
        self.name = way.name
        self.versions: dict[str, str] = {}
        self._python, self._log = python, log
        self._settings = settings | way.settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it waits for its first turn. Raises ``Failed``."""
        runner = Path(__file__).with_name(f"run_{self.way.environment}.py")
        threads = str(self._settings["threads"])
        quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "DO_NOT_TRACK": "1"}
        limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        results, end = os.pipe()  # not standard output, where libraries print
        settings = self._settings | {"results": end}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, runner, json.dumps(settings)],
                env={**os.environ, **quiet, **limits},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(end,),
                start_new_session=True,
            )
        os.close(end)
        self._results = os.fdopen(results, "rb", buffering=0)
        self.versions = self._answer(START_LIMIT_S)["versions"]
        self._signal(signal.SIGSTOP)

    def turn(self, steps: int) -> float:
        """Seconds that so many steps took; stopped after. Raises ``Failed``."""
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"steps": steps}).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer(TURN_LIMIT_S)["seconds"]
        except OSError as error:
            raise Failed(f"{self.name} died; see {self._log}") from error
        finally:
            self._signal(signal.SIGSTOP)

    def finish(self) -> Result:
        """After the last turn. Raises ``Failed``."""
        self._signal(signal.SIGCONT)
        return Result(**self._answer(TURN_LIMIT_S))

    def stop(self) -> None:
        """End it and its children. Safe to call twice."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._results.close()
        self._process = None

    def _answer(self, limit_s: float) -> dict:
        """The next line of the runner: one turn, one line."""
        if not select.select([self._results], [], [], limit_s)[0]:
            raise Failed(f"{self.name} took more than {limit_s} s")
        line = self._results.readline()
        if not line:
            raise Failed(f"{self.name} ended; see {self._log}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
