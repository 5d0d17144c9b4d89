"""The engine beside transformers, vLLM and llama.cpp: tokens a second with its inside shown.

    .venv/bin/python benchmarks/engine_throughput.py [--only throughput ...] [--json FILE]

Parts, of which `--only` chooses some: `throughput` (output tokens/s at 1, 8, 32 concurrent
requests) and `prefill` against the peers; `taps`, `steering`, `joining`, `memory` of ours alone.
Peers get virtual environments of their own below `.bench/`, made once. Everybody answers the
same kind of prompt greedily with the same number of tokens; no prompt is used twice. Ours runs
as a process behind its socket with 10 probes and the 32 strongest of 4,608 features read at
every token. Each peer is tried in several ways, and its best counts. Of a peer only its best
ways take part in the rounds, which alternate; who is not measured is stopped.

Time it on a quiet machine: about 50 minutes in full, 12 for `--no-peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from peers import contest, figures, gguf_files, white_box
from peers.contestants import configs
from peers.own_engine import OwnEngine, endless
from peers.prompts import Prompts

ROOT = Path(__file__).parent.parent
BENCH = ROOT / ".bench"
MODEL = "smollm2-135m"
PARTS = ("throughput", "prefill", "taps", "steering", "joining", "memory")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    parser.add_argument("--no-ours", action="store_true", help="measure the peers alone")
    parser.add_argument("--peers", nargs="+", help="families of peers by their first letters")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all contestants")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of taps and steering")
    parser.add_argument("--joins", type=int, default=10, help="long prompts that join")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of a request")
    parser.add_argument("--model", type=Path, default=ROOT / ".test-home" / "models" / MODEL)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


class Benchmark:
    """One run: what was chosen, and what it found."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        self.chosen = chosen
        self.scratch = scratch
        self.rows: list[figures.Row] = []
        self.found: dict[str, object] = {"machine": figures.machine()}
        self.prompts = Prompts(chosen.model)
        self.endless = endless(chosen.model, BENCH / "models" / chosen.model.name)
        script = Path(__file__).parent / "peers" / "random_taps.py"
        command = [sys.executable, str(script), str(chosen.model), str(scratch)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def wants(self, *parts: str) -> bool:
        return any(part in self.chosen.only for part in parts)

    def engine(self) -> OwnEngine:
        return OwnEngine(self.scratch, self.endless)

    def describe(self) -> None:
        for name, value in figures.machine().items():
            shown = " ".join(f"{x:.1f}" for x in value) if name == "load" else value
            say(f"{name:<9} {shown}")
        say("")

    def memory(self) -> None:
        """First of all, on an engine that has done nothing yet."""
        with self.engine() as engine:
            found = white_box.memory(engine, self.prompts, self.chosen.tokens)
        self._add("memory", asdict(found), [found.row()])
        say(f"memory    {found.row().measured}")

    def contest(self) -> None:
        """Output and prefill tokens a second against the peers."""
        jobs = contest.output_jobs(self.chosen.tokens) if self.wants("throughput") else []
        jobs += contest.prefill_jobs() if self.wants("prefill") else []
        table = contest.Table(jobs, OwnEngine.name)
        with ExitStack() as stack:
            peers = stack.enter_context(
                contest.chosen_peers(self._configs(), BENCH, table, self.prompts)
            )
            contestants: list[contest.Contestant] = [*peers]
            if not self.chosen.no_ours:
                ours = stack.enter_context(self.engine())
                say(f"ours      {ours.description.dtype}, {ours.description.architecture}")
                ours.measure(self.prompts.short(2), 2, 8)
                contestants.insert(0, ours)
            say(f"versions  {json.dumps(table.versions)}")
            contest.run_rounds(contestants, self.chosen.rounds, table, self.prompts, say)
        self._add("contest", asdict(table), [] if self.chosen.no_ours else [*table.rows()])
        for job in table.jobs:
            say(f"\n{job.what}")
            for name, rates in table.rates[job.what].items():
                say(f"  {name:<46} {figures.spread(rates)}")

    def white_box(self) -> None:
        """Taps, against an engine without any; steering and joining."""
        with self.engine() as engine:
            if self.wants("taps"):
                with OwnEngine(self.scratch, self.endless, taps=False) as bare:
                    self._pairs(
                        "taps",
                        white_box.taps(engine, bare, self.prompts, self.chosen.pairs, say),
                    )
            if self.wants("steering"):
                found = white_box.steering(engine, self.prompts, self.chosen.pairs, say)
                self._pairs("steering", found)
            if self.wants("joining"):
                joins = white_box.joining(engine, self.prompts, self.chosen.joins, say)
                self._add("joining", asdict(joins), [*joins.rows()])

    def _pairs(self, part: str, pairs: list[white_box.Pairs]) -> None:
        self._add(part, [asdict(one) for one in pairs], [one.row() for one in pairs])

    def _configs(self) -> list:
        if self.chosen.no_peers:
            return []
        q4_1 = gguf_files.q4_1(BENCH, MODEL)
        q8_0 = gguf_files.q8_0(q4_1)
        found = configs(self.chosen.model, q4_1, q8_0, os.cpu_count() or 1)
        wanted = tuple(self.chosen.peers or ("",))
        return [one for one in found if one.family.lower().startswith(wanted)]

    def _add(self, part: str, found: object, rows: list[figures.Row]) -> None:
        self.found[part] = found
        self.rows += rows


def main() -> None:
    chosen = arguments()
    # Peers are in groups of their own, and stopped: end them also when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        benchmark = Benchmark(chosen, Path(scratch))
        benchmark.describe()
        if benchmark.wants("memory"):
            benchmark.memory()
        if benchmark.wants("throughput", "prefill"):
            benchmark.contest()
        if benchmark.wants("taps", "steering", "joining"):
            benchmark.white_box()
    say("\n" + figures.markdown(benchmark.rows))
    if chosen.json:
        rows = [asdict(row) for row in benchmark.rows]
        chosen.json.write_text(json.dumps(benchmark.found | {"table": rows}, indent=2))


if __name__ == "__main__":
    main()
