"""Ours against the peers: a trial picks each peer's best ways to run, then rounds alternate.

In a round every job is done by all contestants one after the other, a different one first each
time, with prompts that nobody has seen. Only the one that is measured runs.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from peers.contestants import Config, Failed, Peer, Run
from peers.environments import python_of
from peers.figures import Interval, Row, bootstrap, spread
from peers.prompts import Prompt, Prompts

LEVELS = (1, 8, 32)
PREFILL_LEVELS = (1, 8)
PREFILL_TOKENS = 512
PREFILL_PROMPTS = 8
_TRIES = 2
_CLOSE = 0.9  # a way to run that comes this near to its family's best stays in the rounds


class Contestant(Protocol):
    """Whoever can be measured."""

    name: str

    def measure(self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int) -> Run:
        """Do the job, then be still."""


@dataclass(frozen=True)
class Job:
    """What is measured; ``goal`` is the least ratio of ours to the best peer's."""

    what: str
    concurrency: int
    max_tokens: int
    goal: float

    @property
    def is_prefill(self) -> bool:
        return self.max_tokens == 1

    def prompts(self, source: Prompts) -> list[Prompt]:
        if self.is_prefill:
            return [source.of_length(PREFILL_TOKENS) for _ in range(PREFILL_PROMPTS)]
        return source.short(self.concurrency)

    def rate(self, contestant: Contestant, prompts: Sequence[Prompt]) -> float:
        """Tokens a second: of the prompts for prefill, else of the answers."""
        run = contestant.measure(prompts, self.concurrency, self.max_tokens)
        counted = sum(len(p.tokens) for p in prompts) if self.is_prefill else run.n_tokens
        return counted / run.seconds


def output_jobs(n_tokens: int) -> list[Job]:
    return [Job(f"output tokens/s at {n} concurrent", n, n_tokens, 1.5) for n in LEVELS]


def prefill_jobs() -> list[Job]:
    what = f"prefill tokens/s, {PREFILL_TOKENS}-token prompts, at {{}} concurrent"
    return [Job(what.format(n), n, 1, 1.0) for n in PREFILL_LEVELS]


@dataclass
class Table:
    """Tokens a second by job and contestant, one figure a round."""

    jobs: list[Job]
    ours: str
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    trial: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Ours over the best peer's median, job by job, with an interval over rounds."""
        for job in self.jobs:
            rates = self.rates[job.what]
            ours = spread(rates[self.ours])
            peers = [name for name in rates if name != self.ours]
            if not peers:
                yield Row(job.what, "", ours)
                continue
            best = max(peers, key=lambda name: statistics.median(rates[name]))
            ratio = self._ratio(rates, peers)
            measured = f"{ratio} x: ours {ours}, best {spread(rates[best])}, {best}"
            yield Row(job.what, f">= {job.goal} x the best peer", measured, ratio.value >= job.goal)

    def _ratio(self, rates: dict[str, list[float]], peers: Sequence[str]) -> Interval:
        def figure(rounds: Sequence[int]) -> float:
            medians = {
                name: statistics.median(rates[name][i] for i in rounds)
                for name in (self.ours, *peers)
            }
            return medians[self.ours] / max(medians[name] for name in peers)

        return bootstrap(len(rates[self.ours]), figure)


@contextmanager
def chosen_peers(
    configs: Sequence[Config], folder: Path, table: Table, source: Prompts
) -> Iterator[list[Peer]]:
    """Start and try every way; those that are best at some job, or near, stay alive."""
    kept: list[Peer] = []
    try:
        for family in dict.fromkeys(config.family for config in configs):
            tried: list[Peer] = []
            for config in (one for one in configs if one.family == family):
                peer = Peer(
                    config,
                    python_of(folder, config.environment),
                    folder / f"{config.environment}.{len(kept)}.{len(tried)}.log",
                )
                kept.append(peer)
                if _try(peer, table, source):
                    tried.append(peer)
            for peer in tried:
                if not _is_near_best(peer, tried, table):
                    peer.stop()
        yield [peer for peer in kept if peer.running]
    finally:
        for peer in kept:
            peer.stop()


def _try(peer: Peer, table: Table, source: Prompts) -> bool:
    """Each job, its best try. False, with the reason in the table, for one that does not run."""
    try:
        peer.start()
        table.versions[peer.config.environment] = peer.versions
        peer.measure(source.short(2), 2, 8)
        rates = {
            job.what: max(job.rate(peer, job.prompts(source)) for _ in range(_TRIES))
            for job in table.jobs
        }
    except Failed as error:
        table.left_out[peer.name] = str(error)
        print(f"trial     {peer.name}: left out, {error}", flush=True)
        peer.stop()
        return False
    table.trial[peer.name] = rates
    figures = " ".join(f"{rate:.0f}" for rate in rates.values())
    print(f"trial     {peer.name}: {figures} (load {os.getloadavg()[0]:.1f})", flush=True)
    return True


def _is_near_best(peer: Peer, tried: Sequence[Peer], table: Table) -> bool:
    return any(
        table.trial[peer.name][job.what]
        >= _CLOSE * max(table.trial[other.name][job.what] for other in tried)
        for job in table.jobs
    )


def run_rounds(
    contestants: Sequence[Contestant],
    n_rounds: int,
    table: Table,
    source: Prompts,
    say: Callable[[str], None],
) -> None:
    """Fill ``table.rates``."""
    table.rates = {job.what: {one.name: [] for one in contestants} for job in table.jobs}
    for number in range(n_rounds):
        for job in table.jobs:
            at = number % len(contestants)
            rates = table.rates[job.what]
            for one in (*contestants[at:], *contestants[:at]):
                rates[one.name].append(job.rate(one, job.prompts(source)))
            latest = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
            say(f"round {number + 1}   {job.what}: {latest} (load {os.getloadavg()[0]:.1f})")
