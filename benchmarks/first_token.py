"""Time to first token with the guard on and off, start-up time and memory, in one run.

    python benchmarks/first_token.py [--pairs 100]

Two servers run side by side on homes of their own, one with the guard, one without; a client
asks them in turn, order alternating, with 50-token prompts that never repeat. An idle server
computes nothing, so each pair differs by the guard alone. The ratio is of medians; its
interval is a bootstrap over pairs. Time it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
MODELS = ROOT / ".test-home" / "models"
WORDS = [
    "river",
    "bridge",
    "garden",
    "window",
    "letter",
    "music",
    "winter",
    "table",
    "harbour",
    "engine",
    "paper",
    "morning",
    "lamp",
    "mountain",
    "teacher",
    "ticket",
    "yellow",
    "market",
    "island",
    "kitchen",
    "thunder",
    "library",
    "shoulder",
    "copper",
    "village",
    "silver",
    "blanket",
    "journey",
    "pepper",
    "candle",
]
PROMPT_TOKENS = 50


class Server:
    """`fortpoint serve` on a fresh home with the model already there."""

    def __init__(self, home: Path, *settings: str) -> None:
        (home / "models").mkdir(parents=True, exist_ok=True)
        if not (home / "models" / "smollm2-135m").exists():
            (home / "models" / "smollm2-135m").symlink_to(MODELS / "smollm2-135m")
        options = [option for setting in settings for option in ("--set", setting)]
        started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fortpoint.cli.main", "serve", "--port", "0", *options],
            env={**os.environ, "FORTPOINT_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = ""
        while "Stop with Ctrl-C" not in said:
            said += self.process.stdout.readline()
        self.address = re.search(r"at (http://\S+)", said)[1]
        key = re.search(r"sk-fp-\S+", said)
        (home / "key").write_text(key[0]) if key else None
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {(home / 'key').read_text()}"}, timeout=60
        )
        while self.client.get(f"{self.address}/health/ready").status_code != 200:
            time.sleep(0.02)
        self.start_s = time.monotonic() - started

    def first_token_s(self, prompt: str) -> float:
        """Seconds from sending the request to the first piece of text."""
        body = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
        }
        start = time.perf_counter()
        with self.client.stream("POST", f"{self.address}/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    if choices and choices[0]["delta"].get("content"):
                        return time.perf_counter() - start
        raise AssertionError("no text came")

    def memory_mb(self) -> dict[str, float]:
        children = psutil.Process(self.process.pid).children()
        return {
            name: child.memory_info().rss / 1e6
            for child in children
            for name in ("engine", "gateway")
            if f"fortpoint.{name}" in " ".join(child.cmdline())
        }

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        self.process.stdout.close()


def prompt(source: random.Random) -> str:
    """About 15 words, which with the template make 50 tokens."""
    return "Write about " + " ".join(source.choices(WORDS, k=11)) + "."


def interval(off: list[float], on: list[float], source: random.Random) -> tuple[float, float]:
    """95 % bootstrap interval of median(on) / median(off) - 1 over pairs."""
    pairs = list(zip(off, on, strict=True))
    ratios = []
    for _ in range(2000):
        drawn = source.choices(pairs, k=len(pairs))
        ratios.append(
            statistics.median(p[1] for p in drawn) / statistics.median(p[0] for p in drawn) - 1
        )
    ratios.sort()
    return ratios[50], ratios[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    source = random.Random(0)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"hardware  {platform.machine()}, {os.cpu_count()} cores, {_processor()}")
    print(f"commit    {commit.stdout.strip()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        Server(Path(folder) / "on").stop()  # makes the state; the start that is timed is the second
        on = Server(Path(folder) / "on")
        off = Server(Path(folder) / "off", "guard.enabled=false")
        try:
            times: dict[str, list[float]] = {"off": [], "on": []}
            for i in range(-5, pairs):
                text = prompt(source)
                for server, name in [(off, "off"), (on, "on")][:: 1 if i % 2 else -1]:
                    seconds = server.first_token_s(text)
                    if i >= 0:
                        times[name].append(seconds)
            report(on, times, source)
        finally:
            on.stop()
            off.stop()


def report(on: Server, times: dict[str, list[float]], source: random.Random) -> None:
    low, high = interval(times["off"], times["on"], source)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    cost = medians["on"] / medians["off"] - 1
    memory = on.memory_mb()
    print(f"pairs     {len(times['on'])}, prompts of about {PROMPT_TOKENS} tokens\n")
    print(f"{'what':<38}{'measured':>24}{'goal':>10}")
    rows = [
        ("first token, guard on, median", f"{medians['on'] * 1e3:.0f} ms", "500 ms"),
        ("first token, guard off, median", f"{medians['off'] * 1e3:.0f} ms", ""),
        (
            "first token, guard on, p95",
            f"{statistics.quantiles(times['on'], n=20)[-1] * 1e3:.0f} ms",
            "",
        ),
        ("guard's share of first token", f"{cost:+.1%} [{low:+.1%}, {high:+.1%}]", "<= 3 %"),
        ("second start to ready", f"{on.start_s:.1f} s", "< 10 s"),
        ("engine memory", f"{memory['engine']:.0f} MB", "< 1000 MB"),
        ("gateway memory", f"{memory['gateway']:.0f} MB", "< 200 MB"),
    ]
    for what, measured, goal in rows:
        print(f"{what:<38}{measured:>24}{goal:>10}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
