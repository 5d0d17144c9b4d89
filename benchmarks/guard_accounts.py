"""What the guard's memory of conversations and accounts catches, what it costs, whom it hurts.

    python benchmarks/guard_accounts.py ../shared/data/prompts.jsonl.gz [--json]

- conversations: 500 of six benign turns, 500 of one benign source, and crescendos made of
  harmful requests that the detectors let pass one by one, the milder first
- an attacker who sees every score and keeps the best of random edits (best-of-N, arXiv
  2412.03556), 1,000 queries an attack, with the accounts' risk off and on
- the same attack shared between two keys of two users
- a day of 200 honest accounts, 100 to 300 prompts each, some of them hard but harmless, with
  retries of what was refused
- the time of one request's account and conversation work

Everything is judged by text alone, with the shipped detectors and the shipped policy, on a
simulated clock. An attacker waits as long as ``Retry-After`` says, and stops when suspended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import platform
import random
import sqlite3
import statistics
import string
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fortpoint.config import Guard as GuardConfig
from fortpoint.errors import AccountSlowed, AccountSuspended, AccountUnderReview
from fortpoint.guard.account import suspicion
from fortpoint.guard.account_desk import AccountDesk
from fortpoint.guard.account_ledger import AccountLedger
from fortpoint.guard.asking import Sender, asked_by
from fortpoint.guard.conversation import Conversations, State, advance, crescendo
from fortpoint.guard.guard import Guard
from fortpoint.guard.policy_file import shipped_policy
from fortpoint.store.database import Database
from fortpoint.types import Message, Role, Verdict

_QUERIES = 1000
_DAY_S = 86_400.0
_POLICY = shipped_policy().policy


@dataclass
class World:
    """A guard, a desk over a database of its own, and a clock that is set by hand."""

    guard: Guard
    desk: AccountDesk
    clock: list[float] = field(default_factory=lambda: [time.time()])
    judged: dict[str, Verdict] = field(default_factory=dict)
    n_requests: int = 0

    def judge(self, text: str) -> Verdict:
        if text not in self.judged:
            self.judged[text] = self.guard.judge((Message(Role.USER, text[:4000]),), None)
        return self.judged[text]

    async def ask(self, sender: Sender, text: str) -> str:
        """allow, block, slowed, review or suspended."""
        try:
            await self.desk.admit(sender.key_id, sender.user)
            verdict = self.judge(text)
            self.n_requests += 1
            asked = asked_by(
                sender,
                self.clock[0],
                f"req_{self.n_requests}",
                [text],
                verdict.scores,
                verdict.action,
                self.desk.sketcher,
            )
            await self.desk.observe(asked, logprobs=False, attempt=True, exempt=False)
        except AccountSlowed as error:
            self.clock[0] += error.retry_after_s
            return "slowed"
        except AccountUnderReview:
            return "review"
        except AccountSuspended:
            return "suspended"
        return verdict.action


class NoAudit:
    """Counts what would be written."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    async def append(self, entry: object) -> None:
        self.entries.append(str(getattr(entry, "detail", "")))


async def _world(guard: Guard, folder: Path, name: str) -> tuple[World, NoAudit, Database]:
    database = Database(str(folder / f"{name}.db"))
    await database.migrate()
    audit, clock = NoAudit(), [time.time()]
    ledger = AccountLedger(database)
    desk = await AccountDesk.open(ledger, audit, _POLICY.account, lambda: clock[0])
    return World(guard, desk, clock), audit, database


def _rows(file: Path) -> dict[str, list[dict[str, str]]]:
    rows = defaultdict(list)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows[row["label"]].append(row)
    return rows


def edited(text: str, rng: random.Random, sigma: float = 0.4) -> str:
    """One best-of-N edit: letters within words shuffled, capitals, now and then another sign."""
    words = []
    for word in text.split(" "):
        inner = list(word[1:-1])
        if len(word) > 3 and rng.random() < sigma**0.5:
            rng.shuffle(inner)
        words.append(word[:1] + "".join(inner) + word[-1:] if len(word) > 1 else word)
    signs = []
    for sign in " ".join(words):
        turned = sign.swapcase() if rng.random() < sigma**0.5 else sign
        noisy = turned in string.printable[:94] and rng.random() < sigma**3
        signs.append(chr(ord(turned) + rng.choice((-1, 1))) if noisy else turned)
    return "".join(signs)


def _worst(verdict: Verdict) -> float:
    return max(score.score - score.threshold for score in verdict.scores)


async def _attack(world: World, text: str, senders: list[Sender], rng: random.Random) -> Counter:
    """Random search: each query edits the best so far a little, or the original."""
    best, least = text, _worst(world.judge(text))
    ends: Counter = Counter()
    for number in range(_QUERIES):
        query = edited(rng.choice((text, best)), rng, rng.choice((0.05, 0.15, 0.4)))
        end = await world.ask(senders[number % len(senders)], query)
        ends[end] += 1
        world.clock[0] += 1.0
        if end in ("allow", "block") and (found := _worst(world.judge(query))) < least:
            best, least = query, found
        world.judged.pop(query, None)
    return ends


async def best_of_n(guard: Guard, folder: Path, attacks: list[str]) -> dict[str, object]:
    """How many of 1,000 queries get an answer, attack by attack."""
    shown = {}
    for name, n_keys in (("risk off", 0), ("risk on", 1), ("risk on, two keys", 2)):
        through, refused, suspended, linked = [], Counter(), 0, 0
        for number, text in enumerate(attacks):
            world, _, database = await _world(guard, folder, f"{n_keys}-{number}")
            senders = [Sender(f"key{i}", f"user{i}") for i in range(max(1, n_keys))]
            if n_keys:
                ends = await _attack(world, text, senders, random.Random(number))
            else:
                ends = _undisturbed(world, text, random.Random(number))
            through.append(ends["allow"])
            refused += ends
            suspended += ends["suspended"] > 0
            await world.desk.flush()
            linked += bool(await world.desk.ledger.links("key:key0"))
            await database.close()
        shown[name] = {
            "attacks": len(attacks),
            "answered of 1000, mean": round(statistics.mean(through), 1),
            "answered of 1000, median": statistics.median(through),
            "attacks with an answer": sum(n > 0 for n in through),
            "ends": dict(refused),
            "suspended": suspended,
            "linked": linked,
        }
    return shown


def _undisturbed(world: World, text: str, rng: random.Random) -> Counter:
    best, least = text, _worst(world.judge(text))
    ends: Counter = Counter()
    for _ in range(_QUERIES):
        query = edited(rng.choice((text, best)), rng, rng.choice((0.05, 0.15, 0.4)))
        verdict = world.judge(query)
        world.judged.pop(query)
        ends[verdict.action] += 1
        if (found := _worst(verdict)) < least:
            best, least = query, found
    return ends


async def honest_day(guard: Guard, folder: Path, rows: dict, rng: random.Random) -> dict:
    """200 accounts, in one world: what one does must not fall back on another."""
    world, audit, database = await _world(guard, folder, "honest")
    plain, hard = rows["benign"], rows["benign_hard"]
    by_source = defaultdict(list)
    for row in plain:
        by_source[row["dataset"]].append(row["text"])
    senders = [Sender(f"honest{number}", f"person{number}") for number in range(200)]
    habits = {
        one.key_id: (rng.choice(list(by_source)), rng.choice((0.0, 0.02, 0.1))) for one in senders
    }
    asks = sorted(
        (rng.random() * _DAY_S, number)
        for number in range(len(senders))
        for _ in range(rng.randint(100, 300))
    )
    start, ends, risks = world.clock[0], Counter(), Counter()
    for moment, number in asks:
        world.clock[0] = max(world.clock[0], start + moment)
        sender = senders[number]
        source, hardness = habits[sender.key_id]
        own = rng.random() < 0.7
        text = rng.choice(by_source[source]) if own else rng.choice(plain)["text"]
        text = rng.choice(hard)["text"] if rng.random() < hardness else text
        end = await world.ask(sender, text)
        for _ in range(rng.randint(0, 2) if end == "block" else 0):  # tries it in other words
            world.clock[0] += 20.0
            ends[
                "again " + await world.ask(sender, text + rng.choice((" please", "?", " Why?")))
            ] += 1
        ends[end] += 1
    for sender in senders:
        risks[round(world.desk.risk(f"key:{sender.key_id}"))] += 1
    await database.close()
    return {
        "events": _kinds(folder / "honest.db"),
        "accounts": len(senders),
        "requests": len(asks),
        "ends": dict(ends),
        "consequences": len(audit.entries),
        "accounts by risk at the end of the day": dict(sorted(risks.items())),
    }


def _kinds(database: Path) -> dict[str, float]:
    """The weight of all events, by kind."""
    query = "SELECT kind, sum(weight) FROM account_events GROUP BY kind"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {kind: round(weight, 1) for kind, weight in connection.execute(query)}


def conversations(world: World, rows: dict, rng: random.Random) -> dict:
    """How many are stopped, by a turn of their own or by the crescendo."""
    plain = [row["text"] for row in rows["benign"]]
    by_source = defaultdict(list)
    for row in rows["benign"] + rows["benign_hard"]:
        by_source[row["dataset"]].append(row["text"])
    sources = [texts for texts in by_source.values() if len(texts) >= 60]
    rising = _rising(world, rows, rng)
    kinds = {
        "benign, any source": [rng.sample(plain, 6) for _ in range(500)],
        "benign, one source": [rng.sample(rng.choice(sources), 6) for _ in range(500)],
        "crescendo": [_crescendo(rising, plain, rng) for _ in range(200)],
    }
    return {
        name: dict(Counter(_ended(world, turns) for turns in some)) for name, some in kinds.items()
    }


def _rising(world: World, rows: dict, rng: random.Random) -> dict[int, list[str]]:
    """Harmful requests that pass alone, by tenths of suspicion."""
    steps = defaultdict(list)
    for row in rng.sample(rows["harmful_request"], 1500):
        verdict = world.judge(row["text"])
        if verdict.action == "allow":
            most = max(suspicion(score.score, score.threshold) for score in verdict.scores)
            steps[int(most * 10)].append(row["text"])
    return steps


def _crescendo(steps: dict[int, list[str]], plain: list[str], rng: random.Random) -> list[str]:
    return [rng.choice(plain), *(rng.choice(steps[tenth]) for tenth in (1, 3, 5, 6, 8))]


def _ended(world: World, turns: list[str]) -> str:
    state = State()
    for turn in turns:
        verdict = world.judge(turn)
        if verdict.action != "allow":
            return "stopped by a turn"
        found = {
            score.detector: suspicion(score.score, score.threshold) for score in verdict.scores
        }
        state = advance(state, [found], _POLICY.conversation)
        if crescendo(state, _POLICY.conversation) >= 0.5:
            return "stopped as a crescendo"
    return "passed"


async def cost(guard: Guard, folder: Path, texts: list[str]) -> dict[str, float]:
    """Microseconds of processor time of what is not the detectors' own, for each request."""
    world, _, database = await _world(guard, folder, "cost")
    met = Conversations(_POLICY.conversation)
    verdicts = [world.judge(text) for text in texts]
    taken = []
    for number, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
        sender = Sender(f"key{number % 50}", f"user{number % 50}")
        messages = (Message(Role.USER, text),)
        started = time.thread_time()
        await world.desk.admit(sender.key_id, sender.user)
        place = met.follow(sender.key_id, messages, world.clock[0])
        found = {
            score.detector: suspicion(score.score, score.threshold) for score in verdict.scores
        }
        met.keep(place, advance(place.state, [found], _POLICY.conversation), world.clock[0])
        asked = asked_by(
            sender, world.clock[0], "req", [text], verdict.scores, "allow", world.desk.sketcher
        )
        await world.desk.observe(asked, logprobs=False, attempt=True, exempt=False)
        taken.append((time.thread_time() - started) * 1e6)
    await database.close()
    taken.sort()
    return {f"p{share}": round(taken[len(taken) * share // 100], 1) for share in (50, 90, 99)}


async def measure(file: Path, n_attacks: int) -> dict[str, object]:
    rows, rng = _rows(file), random.Random(5)
    guard = Guard.load(GuardConfig())
    pool = rows["harmful_request"] + rows["jailbreak"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world, _, database = await _world(guard, folder, "conversations")
        blocked = [row["text"] for row in rng.sample(pool, 40 * n_attacks)]
        attacks = [text for text in blocked if world.judge(text).action == "block"][:n_attacks]
        shown = {
            "conversations": conversations(world, rows, rng),
            "microseconds": await cost(
                guard, folder, [row["text"] for row in rng.sample(rows["benign"], 3000)]
            ),
            "honest day": await honest_day(guard, folder, rows, rng),
            "best of n": await best_of_n(guard, folder, attacks),
        }
        await database.close()
    return {"machine": platform.machine(), "python": platform.python_version(), **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="prompts.jsonl.gz of the shared data")
    parser.add_argument("--attacks", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shown = asyncio.run(measure(options.file, options.attacks))
    if options.json:
        print(json.dumps(shown))
        return
    for name, part in shown.items():
        print(f"{name}:")
        for key, value in part.items() if isinstance(part, dict) else [("", part)]:
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
