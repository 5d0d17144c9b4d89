"""What looking inside costs: taps, steering, a long prompt that joins, and memory.

Two sides alternate, their order drawn anew for each pair, on prompts of the same lengths; the
ratio is the median over pairs. The engine's own processor time is compared too: a neighbour on
the same cores shifts it less than the clock on the wall. An engine reads its probes for every
row, asked or not, so taps are compared with a second process that has none; a second figure
compares requests that ask with requests that do not, within one process.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fortpoint.engine.protocol import Generate, Steer, Token
from peers.contest import LEVELS
from peers.figures import Row, paired_ratio, spread
from peers.own_engine import DICTIONARY, OwnEngine, OwnRun
from peers.prompts import Prompts

N_FEATURES = 4608
MAX_COST_TAPS = 0.01
MAX_COST_STEERING = 0.03
MAX_STALL_MS = 150
MAX_MEMORY_MB = 700
STREAMS = 32
JOINER_TOKENS = 1500
STREAM_TOKENS = 160
STARTED_TOKENS = 10  # every stream has made these before anything is timed
QUIET_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """An engine, and the requests that it is sent for some lines of prompts."""

    engine: OwnEngine
    requests: Callable[[list[int], int], list[Generate]]

    def ask(self, lines: list[int], n_tokens: int) -> OwnRun:
        """All at once; the engine is paused after, so that others have the cores."""
        run = self.engine.ask(self.requests(lines, n_tokens))
        self.engine.pause()
        return run


@dataclass
class Pairs:
    """Tokens a second, and tokens a second of the engine's processor time, off and on."""

    what: str
    max_cost: float | None
    rates: dict[str, list[float]] = field(default_factory=lambda: {"off": [], "on": []})
    cpu_rates: dict[str, list[float]] = field(default_factory=lambda: {"off": [], "on": []})
    client_share: list[float] = field(default_factory=list)

    def add(self, name: str, run: OwnRun) -> None:
        self.rates[name].append(run.n_tokens / run.seconds)
        self.cpu_rates[name].append(run.n_tokens / max(run.cpu_s, 1e-9))
        self.client_share.append(run.client_cpu_s / run.seconds)

    def row(self) -> Row:
        ratio = paired_ratio(self.rates["off"], self.rates["on"])
        cpu = paired_ratio(self.cpu_rates["off"], self.cpu_rates["on"])
        off, on = (spread(self.rates[name]) for name in ("off", "on"))
        measured = (
            f"on/off {ratio}; by processor time {cpu}; {on} against {off} tokens/s; "
            f"client {statistics.median(self.client_share):.0%} of a core"
        )
        if self.max_cost is None:
            return Row(self.what, "", measured)
        least = 1 - self.max_cost
        return Row(self.what, f">= {least:.2f}", measured, ratio.value >= least)


def alternate(
    source: Prompts, n: int, level: int, sides: dict[str, Side]
) -> Iterator[dict[str, OwnRun]]:
    """``n`` times every side with ``level`` requests at once, after one that does not count."""
    order, names = random.Random(level), list(sides)
    for side in sides.values():
        side.ask(source.draw(level), 16)
    for _ in range(n):
        lines = source.draw(level)
        order.shuffle(names)
        yield {name: sides[name].ask(lines, _pair_tokens(level)) for name in names}


def _pair_tokens(level: int) -> int:
    return 64 if level == LEVELS[-1] else 128


def taps(full: OwnEngine, bare: OwnEngine, source: Prompts, n: int, say: Say) -> list[Pairs]:
    """10 probes and the 32 strongest of 4,608 features of every token, against none."""

    def side(engine: OwnEngine, ask: bool) -> Side:
        return Side(
            engine,
            lambda lines, n_tokens: [
                engine.request(prompt, n_tokens, taps=ask)
                for prompt in source.short(len(lines), lines)
            ],
        )

    sides = {"on": side(full, True), "unasked": side(full, False), "off": side(bare, False)}
    found = []
    for level in LEVELS:
        what = f"probes and features on against {{}}, {level} concurrent"
        pairs = Pairs(what.format("off"), MAX_COST_TAPS)
        unasked = Pairs(what.format("not asked for"), None)
        for runs in alternate(source, n, level, sides):
            for off, one in (("off", pairs), ("unasked", unasked)):
                one.add("off", runs[off])
                one.add("on", runs["on"])
        for one in (pairs, unasked):
            say(f"taps      {one.what}: {one.row().measured}")
        found += [pairs, unasked]
    return found


def configurations(n: int) -> list[tuple[Steer, ...]]:
    """``n`` ways to steer the answer: other features, strengths and modes in each."""
    modes = ("add", "clamp", "ablate")
    return [
        (
            Steer(
                mode=modes[number % len(modes)],
                target=f"{DICTIONARY}/{number * 131 % N_FEATURES}",
                strength=0.25 + number / 32,
                scope="answer",
            ),
        )
        for number in range(n)
    ]


def steering(engine: OwnEngine, source: Prompts, n: int, say: Say) -> list[Pairs]:
    """32 configurations in one batch against none, probes and features on in both."""
    different = configurations(STREAMS)

    def side(steer: bool) -> Side:
        return Side(
            engine,
            lambda lines, n_tokens: [
                engine.request(prompt, n_tokens, steer=one if steer else ())
                for prompt, one in zip(source.short(len(lines), lines), different, strict=True)
            ],
        )

    pairs = Pairs(f"{STREAMS} different steering configurations against none", MAX_COST_STEERING)
    for runs in alternate(source, n, STREAMS, {"off": side(False), "on": side(True)}):
        for name, run in runs.items():
            pairs.add(name, run)
    say(f"steering  {pairs.row().measured}")
    return [pairs]


@dataclass(frozen=True)
class Join:
    """One long prompt that joined, in ms."""

    longest_gap: float
    longest_gap_before: float
    first_token: float


@dataclass
class Joins:
    joins: list[Join] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        what = f"{STREAMS} streams, a {JOINER_TOKENS}-token prompt joins: "
        worst = max(join.longest_gap for join in self.joins)
        yield Row(
            f"{what}longest gap of any other stream",
            f"<= {MAX_STALL_MS} ms",
            f"{spread([join.longest_gap for join in self.joins])} ms; "
            f"before it joins {spread([join.longest_gap_before for join in self.joins])} ms",
            worst <= MAX_STALL_MS,
        )
        first = spread([join.first_token for join in self.joins])
        yield Row(f"{what}its time to first token", "", f"{first} ms")


def joining(engine: OwnEngine, source: Prompts, n: int, say: Say) -> Joins:
    """``n`` times, after one that does not count."""
    joins = Joins()
    gc.freeze()
    gc.disable()  # a collection here would look like a stall there
    try:
        for number in range(-1, n):
            join = engine.do(_join(engine, source))
            if number >= 0:
                joins.joins.append(join)
                say(f"joining   gap {join.longest_gap:.0f} ms, first {join.first_token:.0f} ms")
    finally:
        gc.enable()
    return joins


async def _join(engine: OwnEngine, source: Prompts) -> Join:
    prompts = source.short(STREAMS)
    arrivals: list[list[float]] = [[] for _ in prompts]
    tasks = [
        asyncio.create_task(_stream(engine, engine.request(prompt, STREAM_TOKENS), times))
        for prompt, times in zip(prompts, arrivals, strict=True)
    ]
    while min(map(len, arrivals)) < STARTED_TOKENS:
        await asyncio.sleep(0.01)
        _raise_what_failed(tasks)
    quiet = time.perf_counter()
    await asyncio.sleep(QUIET_S)
    joined, first = time.perf_counter(), []
    await _stream(engine, engine.request(source.of_length(JOINER_TOKENS), 1), first)
    _raise_what_failed(tasks)
    if any(task.done() for task in tasks):
        raise RuntimeError("a stream ended before the prompt that joined was read")
    await asyncio.sleep(0.2)  # the gap that the first token ends in
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Join(
        longest_gap=_longest_gap_ms(arrivals, joined, first[0]),
        longest_gap_before=_longest_gap_ms(arrivals, quiet, joined),
        first_token=(first[0] - joined) * 1e3,
    )


async def _stream(engine: OwnEngine, request: Generate, arrivals: list[float]) -> None:
    async with await engine.client.generate(request) as stream:
        async for event in stream:
            if isinstance(event, Token):
                arrivals.append(time.perf_counter())


def _raise_what_failed(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


def _longest_gap_ms(arrivals: list[list[float]], start: float, end: float) -> float:
    """Between two tokens of one stream, of the gaps that overlap ``start`` to ``end``."""
    return max(
        (after - before) * 1e3
        for times in arrivals
        for before, after in itertools.pairwise(times)
        if after > start and before < end
    )


@dataclass(frozen=True)
class Memory:
    """Resident MB of the engine process."""

    loaded: float
    served: float
    peak: float

    def row(self) -> Row:
        measured = (
            f"{self.peak:.0f} MB at most; {self.loaded:.0f} after load, "
            f"{self.served:.0f} after {STREAMS} concurrent and 512-token prompts"
        )
        goal = f"<= {MAX_MEMORY_MB} MB"
        return Row("resident memory of the engine", goal, measured, self.peak <= MAX_MEMORY_MB)


def memory(engine: OwnEngine, source: Prompts, n_tokens: int) -> Memory:
    """Of an engine that has just been started."""
    loaded, _ = engine.memory_mb()
    engine.measure(source.short(STREAMS), STREAMS, n_tokens)
    engine.measure([source.of_length(512) for _ in range(8)], 8, 1)
    served, peak = engine.memory_mb()
    return Memory(loaded, served, peak)
