"""Medians, spreads, bootstrap intervals, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One line of the last table. ``met`` is None where there is no goal."""

    what: str
    goal: str
    measured: str
    met: bool | None = None


def bootstrap(n: int, figure: Callable[[Sequence[int]], float]) -> Interval:
    """``figure`` of the rounds 0 to ``n - 1``, and its interval over rounds drawn anew."""
    source = random.Random(0)
    drawn = sorted(figure(source.choices(range(n), k=n)) for _ in range(_DRAWS))
    return Interval(figure(range(n)), drawn[int(_DRAWS * 0.025)], drawn[int(_DRAWS * 0.975)])


def paired_ratio(off: Sequence[float], on: Sequence[float]) -> Interval:
    """Median over pairs of on / off."""
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    return bootstrap(len(ratios), lambda rounds: statistics.median(ratios[i] for i in rounds))


def spread(values: Sequence[float]) -> str:
    """Median, and the least and the largest value."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def markdown(rows: Sequence[Row]) -> str:
    """The table ``what | goal | measured``."""
    marks = {None: "", True: " (met)", False: " (missed)"}
    lines = ["| what | goal | measured |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.goal} | {row.measured}{marks[row.met]} |" for row in rows]
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Processor, cores, memory, commit, and how busy the machine is before anything starts."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB",
        "software": f"Python {platform.python_version()}, {platform.system()} {platform.release()}",
        "commit": commit.stdout.strip() or "unknown",
        "load": os.getloadavg(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
