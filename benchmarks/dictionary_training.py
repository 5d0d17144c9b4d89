"""Training dictionaries beside SAELens, dictionary_learning and sparsify: tokens a second, FVU.

    .venv/bin/python benchmarks/dictionary_training.py [--harvest FOLDER] [--json FILE]

Everybody learns 4,608 features with 32 active from the same cached activations of the embedded
model (layer 15 if none are given; sinks left out, centred, mean square 1), 2,048 tokens a step,
the same steps in the same order, on all cores: each library's own training loop, in a virtual
environment of its own below `.bench/`, made once. Learning rate, warm-up and decay are the same.
Each is tried in several ways (autocast, compiled, sparse), and the fastest of a library and kind
takes part. dictionary_learning and sparsify offer autocast on graphics cards alone; the fastest
way with autocast put around them takes part too, and is compared with apart.

A run is one training, cut into turns that alternate: while one learns, the others are stopped.
Tokens a second are of whole turns, all that a loop does included; the first turn, with what is
compiled in it, does not count. FVU is measured at the end on rows that nobody trained on, with
the k largest (of a token, or of a batch) kept.

Time it on a quiet machine: about 15 minutes; ``--ways`` names what an earlier trial chose.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peers import figures
from peers.contestants import Failed
from peers.environments import python_of
from sae_peers import activations
from sae_peers.learners import OURS, Learner, Result, Way, own_ways, peers_ways

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
MODEL = "smollm2-135m"
D_SAE, K, BATCH = 4608, 32, 2048
HELD_OUT = 20 * BATCH
WARM_STEPS = 6
TRIAL_STEPS = 8
GOAL = 4.0
RATE = 2e-4 / (D_SAE / 2**14) ** 0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns of every contestant")
    parser.add_argument("--steps", type=int, default=30, help="steps of a turn")
    parser.add_argument("--harvest", type=Path, help="activations to learn from")
    parser.add_argument("--text", type=Path, help="JSONL to harvest, else what is at hand")
    parser.add_argument("--layer", type=int, help="of the harvest, else its first")
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    parser.add_argument("--no-ours", action="store_true", help="measure the peers alone")
    parser.add_argument("--peers", nargs="+", help="libraries by their first letters")
    parser.add_argument("--ways", nargs="+", help="ways that take part untried, by their names")
    parser.add_argument("--model", type=Path, default=ROOT / ".test-home" / "models" / MODEL)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


@dataclass
class Table:
    """What was found: tokens a second by contestant and round, results, trials."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    trial: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)

    def rows(self) -> list[figures.Row]:
        """Ours, kind by kind, against the fastest peer of any kind."""
        ours = [name for name in self.rates if name.startswith(OURS)]
        peers = [name for name in self.rates if not name.startswith(OURS)]
        offered = [name for name in peers if name not in self.beyond]
        found = []
        for name in ours:
            what = f"training tokens/s, {name}"
            if not offered:
                found.append(figures.Row(what, "", figures.spread(self.rates[name])))
                continue
            ratio, best, measured = self._against(name, offered)
            goal = f">= {GOAL:g} x the fastest peer"
            found.append(figures.Row(what, goal, measured, ratio.value >= GOAL))
            if self.beyond:
                _, _, measured = self._against(name, peers)
                found.append(figures.Row(f"{what}, beyond what peers offer", "", measured))
            own, other = self.results[name].fvu, self.results[best].fvu
            least = min(peers, key=lambda one: self.results[one].fvu)
            measured = (
                f"{own:.4f}, theirs {other:.4f}; the least of all peers "
                f"{self.results[least].fvu:.4f}, {least}"
            )
            what = f"FVU on held-out rows, {name}"
            found.append(figures.Row(what, "<= the fastest peer's", measured, own <= other))
        return found

    def _against(self, own: str, peers: Sequence[str]) -> tuple[figures.Interval, str, str]:
        """The ratio to the fastest of ``peers``, which it is, and both in words."""
        best = max(peers, key=lambda one: statistics.median(self.rates[one]))
        ratio = self._ratio(own, peers)
        measured = (
            f"{ratio} x: {figures.spread(self.rates[own])}, best "
            f"{figures.spread(self.rates[best])}, {best}"
        )
        return ratio, best, measured

    def _ratio(self, own: str, peers: Sequence[str]) -> figures.Interval:
        def figure(rounds: Sequence[int]) -> float:
            medians = {
                name: statistics.median(self.rates[name][i] for i in rounds)
                for name in (own, *peers)
            }
            return medians[own] / max(medians[name] for name in peers)

        return figures.bootstrap(len(self.rates[own]), figure)

    def markdown(self) -> str:
        lines = [
            "| who | tokens/s (least to most) | FVU | L0 | never active |",
            "|---|---|---|---|---|",
        ]
        for name, rates in self.rates.items():
            result = self.results[name]
            lines.append(
                f"| {name} | {figures.spread(rates)} | {result.fvu:.4f} | {result.l0:.1f} "
                f"| {result.n_dead} |"
            )
        return "\n".join(lines)


class Benchmark:
    """One run on one pair of files."""

    def __init__(self, chosen: argparse.Namespace, files: activations.Files) -> None:
        self.chosen = chosen
        self.table = Table()
        n_steps = WARM_STEPS + chosen.rounds * chosen.steps
        self._settings: dict[str, object] = {
            "train": str(files.train),
            "held_out": str(files.held_out),
            "batch": BATCH,
            "d_sae": D_SAE,
            "k": K,
            "n_steps": n_steps,
            "rate": RATE,
            "warmup": n_steps // 10,
            "decay": n_steps // 5,
            "threads": os.cpu_count() or 1,
        }

    def run(self) -> None:
        ways = [] if self.chosen.no_peers else self._chosen(self._peers())
        ways = ([] if self.chosen.no_ours else own_ways()) + ways
        with ExitStack() as stack:
            learners = []
            for way in ways:
                learner = self._learner(way)
                stack.callback(learner.stop)
                learner.start()
                self.table.versions[way.environment] = learner.versions
                learner.turn(WARM_STEPS)
                learners.append(learner)
            say(f"versions  {json.dumps(self.table.versions)}")
            self._rounds(learners)
            for learner in learners:
                self.table.results[learner.name] = learner.finish()
                learner.stop()

    def _rounds(self, learners: Sequence[Learner]) -> None:
        self.table.rates = {learner.name: [] for learner in learners}
        for number in range(self.chosen.rounds):
            at = number % max(len(learners), 1)
            for learner in (*learners[at:], *learners[:at]):
                seconds = learner.turn(self.chosen.steps)
                self.table.rates[learner.name].append(self.chosen.steps * BATCH / seconds)
            latest = ", ".join(
                f"{name} {rates[-1]:,.0f}" for name, rates in self.table.rates.items()
            )
            say(f"round {number + 1}   {latest} (load {os.getloadavg()[0]:.1f})")

    def _peers(self) -> list[Way]:
        wanted = tuple(one.lower() for one in self.chosen.peers or ("",))
        return [way for way in peers_ways() if way.family.lower().startswith(wanted)]

    def _chosen(self, ways: Sequence[Way]) -> list[Way]:
        if self.chosen.ways:
            ways = [way for way in ways if way.name in self.chosen.ways]
            if len(ways) < len(self.chosen.ways):
                raise SystemExit(f"of {self.chosen.ways} there are {[way.name for way in ways]}")
        else:
            ways = self._fastest(ways)
        self.table.beyond = [way.name for way in ways if way.beyond]
        return list(ways)

    def _fastest(self, ways: Sequence[Way]) -> list[Way]:
        """Of each library and kind, by a short trial; ways that do not run are left out."""
        best: dict[tuple[str, str, bool], Way] = {}
        for way in ways:
            rate = self._try(way)
            if rate is None:
                continue
            known = best.get(way.group)
            if known is None or rate > self.table.trial[known.name]:
                best[way.group] = way
        return list(best.values())

    def _try(self, way: Way) -> float | None:
        learner = self._learner(way)
        try:
            learner.start()
            learner.turn(WARM_STEPS)
            rate = TRIAL_STEPS * BATCH / learner.turn(TRIAL_STEPS)
        except Failed as error:
            self.table.left_out[way.name] = str(error)
            say(f"trial     {way.name}: left out, {error}")
            return None
        finally:
            learner.stop()
        self.table.trial[way.name] = rate
        say(f"trial     {way.name}: {rate:,.0f} (load {os.getloadavg()[0]:.1f})")
        return rate

    def _learner(self, way: Way) -> Learner:
        if way.environment == "fortpoint":
            python = Path(sys.executable)
        else:
            python = python_of(BENCH, way.environment)
        log = BENCH / f"{way.environment}.{way.architecture}.{way.variant.replace(' ', '_')}.log"
        return Learner(way, python, self._settings, log)


def main() -> None:
    chosen = arguments()
    # Peers are in groups of their own, and stopped: end them also when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine = figures.machine()
    for name, value in machine.items():
        shown = " ".join(f"{x:.1f}" for x in value) if name == "load" else value
        say(f"{name:<9} {shown}")
    n_train = (WARM_STEPS + chosen.rounds * chosen.steps) * BATCH
    scratch = BENCH / "dictionary_training"
    files = activations.prepare(
        scratch, chosen.model, n_train, HELD_OUT, chosen.text, chosen.harvest, chosen.layer
    )
    say(f"data      {files.source}; {n_train:,} tokens to learn from, {HELD_OUT:,} to measure on")
    benchmark = Benchmark(chosen, files)
    try:
        benchmark.run()
    finally:
        for file in (files.train, files.held_out):
            file.unlink(missing_ok=True)
    table = benchmark.table
    say("\n" + table.markdown())
    say("\n" + figures.markdown(table.rows()))
    if chosen.json:
        found = {"machine": machine, "data": asdict(files), "settings": benchmark._settings}
        found |= asdict(table) | {"table": [asdict(row) for row in table.rows()]}
        chosen.json.write_text(json.dumps(found, indent=2, default=str))


if __name__ == "__main__":
    main()
