"""`fortpoint serve` as a process: the real model, engine and database, in a home of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".test-home" / "models" / "smollm2-135m"
FORTPOINT = [sys.executable, "-m", "fortpoint.cli.main"]
START_TIMEOUT_S = 90


@dataclass
class Served:
    home: Path
    process: subprocess.Popen[str]
    said: list[str]
    reading: threading.Thread
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def address(self) -> str:
        return re.search(r"at (http://[0-9.:]+)", self.text)[1]  # type: ignore[index]

    @property
    def key(self) -> str:
        return re.search(r"sk-fp-[a-z2-7]{12}-[A-Za-z0-9_-]{43}", self.text)[0]  # type: ignore[index]

    def child(self, name: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(c for c in children if f"fortpoint.{name}" in " ".join(c.cmdline()))

    def client(self, key: str | None = None) -> openai.OpenAI:
        """Closed by ``stop``: left to the garbage collector, its socket is closed at any time."""
        made = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key=key or self.key, max_retries=0, timeout=60
        )
        self.clients.append(made)
        return made


def start(home: Path) -> Served:
    environment = {**os.environ, "FORTPOINT_HOME": str(home), "PORT": "0"}
    process = subprocess.Popen(
        [*FORTPOINT, "serve"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reading.start()
    return Served(home, process, said, reading)


def wait_until_ready(served: Served) -> Served:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Stop with Ctrl-C" not in served.text or not is_ready(served.address):
        assert served.process.poll() is None, served.text
        assert time.monotonic() < deadline, served.text
        time.sleep(0.05)
    return served


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def stop(served: Served) -> int:
    for client in served.clients:
        client.close()
    served.process.send_signal(signal.SIGINT)
    code = served.process.wait(timeout=30)
    served.reading.join(timeout=10)
    if served.process.stdout is not None:
        served.process.stdout.close()
    return code


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FORTPOINT, *arguments],
        env={**os.environ, "FORTPOINT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def make_home(folder: Path) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "models" / MODEL.name).symlink_to(MODEL)
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = wait_until_ready(start(make_home(tmp_path_factory.mktemp("serve") / "home")))
    yield made
    if made.process.poll() is None:
        stop(made)
