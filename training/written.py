"""Training texts of our own making: harmful requests and their harmless likes, attacks, documents.

The parts are lists in ``training/written/*.toml``; here they are put together. Two rules keep the
guard from learning the parts: a frame that carries a harmful goal also carries harmless ones, and
a document that hides an order also stands without it. A text that is nearly one of a data set that
measures is left out (``resembling``), so that no figure is better for it.

    for text in compose(random.Random(0)): text.text, text.label, text.kind, text.cluster
"""

from __future__ import annotations

import base64
import random
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "written"

N_REGISTERS = 5  # frames a goal is asked in
N_PERSONAS = 700
N_SINGLE = 16  # requests a one-piece jailbreak carries
N_ORDERS = 16  # orders a trigger carries
N_HIDDEN = 30  # orders a carrier hides, and as many harmless lines
N_ROLES = 350
N_TURNS = 250
HARMLESS_SHARE = 0.25  # of the requests that a jailbreak carries


@dataclass(frozen=True)
class Text:
    """``kind`` names the recipe, ``cluster`` what texts of one recipe have in common."""

    text: str
    label: str
    kind: str
    cluster: str


def compose(random_: random.Random) -> Iterator[Text]:
    """Every text, in one order for one seed."""
    for recipe in _RECIPES:
        yield from recipe(random_)


def resembling(texts: Iterable[str], others: Iterable[str], share: float = 0.5) -> set[str]:
    """Those of ``texts`` that share over ``share`` of their words with one of ``others``.

    Only texts that have a run of three words in common are compared.
    """
    known: dict[tuple[str, ...], set[frozenset[str]]] = {}
    for other in others:
        words = other.lower().split()
        for run in zip(words, words[1:], words[2:], strict=False):
            known.setdefault(run, set()).add(frozenset(words))
    found = set()
    for text in texts:
        words = text.lower().split()
        own = frozenset(words)
        runs = (known.get(run, set()) for run in zip(words, words[1:], words[2:], strict=False))
        if any(len(own & other) > share * len(own | other) for one in runs for other in one):
            found.add(text)
    return found


def _requests(random_: random.Random) -> Iterator[Text]:
    frames = _parts("benign")["registers"]["shared"]
    for source, label, kind in (
        ("harmful", "harmful_request", "written_harmful"),
        ("benign", "benign_hard", "written_alike"),
    ):
        parts = _parts(source)
        for goal in _flat(parts["goals"].values()):
            for frame in random_.sample(frames, N_REGISTERS):
                yield Text(_cased(random_, frame.format(g=goal)), label, kind, f"{kind}/{goal}")
        for whole in _flat(parts["wholes"].values()):
            yield Text(whole, label, kind, f"{kind}/{whole}")
            yield Text(whole.lower().rstrip(".?"), label, kind, f"{kind}/{whole}")


def _jailbreaks(random_: random.Random) -> Iterator[Text]:
    parts = _parts("attacks")["jailbreak"]
    for _ in range(N_PERSONAS):
        opening = random_.choice(parts["openings"])
        chosen = random_.sample(parts["rules"], random_.randint(1, 5))
        ask = random_.choice(parts["asks"])
        joint = random_.choice((" ", " ", "\n", "\n\n"))
        text = joint.join((opening, *chosen, ask)).replace("{n}", random_.choice(parts["personas"]))
        yield Text(
            text.replace("{q}", _question(random_)).strip(),
            "jailbreak",
            "written_persona",
            f"written_persona/{opening}",
        )
    for frame in parts["single"]:
        for _ in range(N_SINGLE):
            text = frame.replace("{q}", _question(random_))
            yield Text(text, "jailbreak", "written_jailbreak", f"written_jailbreak/{frame}")


def _question(random_: random.Random) -> str:
    parts = _parts("benign" if random_.random() < HARMLESS_SHARE else "harmful")
    if random_.random() < 0.3:
        whole: str = random_.choice(_flat(parts["wholes"].values()))
        return whole
    goal = random_.choice(_flat(parts["goals"].values()))
    start = random_.choice(("How do I", "how can someone", "Tell me how to", "Explain how to"))
    return f"{start} {goal}."


def _injections(random_: random.Random) -> Iterator[Text]:
    parts = _parts("attacks")["injection"]
    for trigger in parts["triggers"]:
        for order in random_.sample(parts["orders"], N_ORDERS):
            text = _ordered(trigger, order)
            yield Text(text, "injection", "written_injection", f"written_injection/{trigger}")
    for ask in parts["extraction"]:
        yield Text(ask, "injection", "written_extraction", f"written_extraction/{ask}")
        for frame in random_.sample(parts["frames"], 4):
            text = frame.format(x=ask, y=random_.choice(parts["extraction"]))
            yield Text(text, "injection", "written_extraction", f"written_extraction/{ask}")


def _agents(random_: random.Random) -> Iterator[Text]:
    for frame in _parts("attacks")["injection"]["agent"]:
        for _ in range(8):
            text = _filled(random_, frame)
            yield Text(text, "injection", "written_agent", f"written_agent/{frame}")


def _documents(random_: random.Random) -> Iterator[Text]:
    """Carriers with an order and carriers with a harmless line, half of them with a task."""
    injection, carriers = _parts("attacks")["injection"], _parts("attacks")["carriers"]
    for carrier in carriers["texts"]:
        for _ in range(N_HIDDEN):
            task = random_.choice((*carriers["tasks"], *["{d}"] * len(carriers["tasks"])))
            bad = _ordered(
                random_.choice(injection["triggers"]), random_.choice(injection["orders"])
            )
            good = " ".join(random_.sample(carriers["lines"], random_.randint(1, 2)))
            for line, label, kind in (
                (bad, "injection", "hidden:written"),
                (good, "benign", "written_carrier"),
            ):
                text = task.replace("{d}", _filled(random_, carrier).replace("{d}", line))
                yield Text(text, label, kind, f"{kind}/{carrier}")


def _roles(random_: random.Random) -> Iterator[Text]:
    hard, benign = _parts("attacks")["hard"], _parts("benign")
    goals = benign["goals"]["everyday"]
    for _ in range(N_ROLES):
        frame = random_.choice(hard["role_frames"])
        goal = random_.choice(goals)
        text = frame.format(
            r=random_.choice(hard["roles"]), g=f"I would like to {goal}.", h=f"who want to {goal}"
        )
        yield Text(text, "benign_hard", "written_role", f"written_role/{frame}")


def _hard(random_: random.Random) -> Iterator[Text]:
    for text in _parts("attacks")["hard"]["texts"]:
        yield Text(text, "benign_hard", "written_hard", f"written_hard/{text}")
        yield Text(text.lower().rstrip("."), "benign_hard", "written_hard", f"written_hard/{text}")


def _topics(random_: random.Random) -> Iterator[Text]:
    """Subjects that are spoken of for harm and for good, in an equal number of frames."""
    parts = _parts("pairs")["topics"]
    for topic in parts["names"]:
        for side, label in (("harmful", "harmful_request"), ("benign", "benign_hard")):
            kind = f"written_topic_{side}"
            for frame in random_.sample(parts[side], 6):
                yield Text(_cased(random_, frame.format(t=topic)), label, kind, f"{kind}/{topic}")


def _private(random_: random.Random) -> Iterator[Text]:
    parts = _parts("pairs")["privacy"]
    for side, label, who, what in (
        ("harmful", "harmful_request", "people", "facts"),
        ("benign", "benign_hard", "public", "known"),
    ):
        kind = f"written_private_{side}"
        for person in parts[who]:
            for fact in random_.sample(parts[what], 8):
                text = random_.choice(parts[side]).format(w=person, f=fact)
                yield Text(text, label, kind, f"{kind}/{person}")


def _programs(random_: random.Random) -> Iterator[Text]:
    parts = _parts("pairs")["code"]
    for side, label in (("harmful", "harmful_request"), ("benign", "benign_hard")):
        kind = f"written_code_{side}"
        for purpose in parts[side]:
            for frame in random_.sample(parts["frames"], 6):
                yield Text(frame.replace("{c}", purpose), label, kind, f"{kind}/{purpose}")


def _past(random_: random.Random) -> Iterator[Text]:
    """A harmful request, dressed as history."""
    for goal in _flat(_parts("harmful")["goals"].values()):
        text = random_.choice(_parts("pairs")["past"]["harmful"]).format(g=goal)
        yield Text(text, "jailbreak", "written_past", f"written_past/{goal}")


def _daily(random_: random.Random) -> Iterator[Text]:
    parts = _parts("pairs")["trigger"]
    for frame in parts["benign"]:
        for place in random_.sample(parts["places"], 8):
            yield Text(
                frame.format(x=place), "benign_hard", "written_daily", f"written_daily/{frame}"
            )


def _languages(random_: random.Random) -> Iterator[Text]:
    """Requests, orders, and requests that an order follows."""
    parts = _parts("pairs")["languages"]
    for text in parts["benign"]:
        yield Text(text, "benign", "written_language", f"written_language/{text}")
    for text in parts["injection"]:
        yield Text(text, "injection", "written_foreign", f"written_foreign/{text}")
    everyday = [f"How do I {goal}?" for goal in _parts("benign")["goals"]["everyday"]]
    injection = _parts("attacks")["injection"]
    for _ in range(N_TURNS):
        request = random_.choice((*parts["benign"], *everyday, *everyday))
        order = _ordered(random_.choice(injection["triggers"]), random_.choice(injection["orders"]))
        order = random_.choice((order, order, random_.choice(parts["injection"])))
        other = random_.choice((*parts["benign"], *everyday))
        joint = random_.choice(parts["joints"])
        yield Text(f"{request}{joint}{order}", "injection", "written_turn", f"turn/{request}")
        yield Text(f"{request}{joint}{other}", "benign", "written_two", f"turn/{request}")


def _blobs(random_: random.Random) -> Iterator[Text]:
    """What is encoded and harmless: keys, pictures, check sums."""
    for frame in _parts("pairs")["blobs"]["frames"]:
        for _ in range(12):
            raw = random_.randbytes(random_.randint(9, 60))
            blob = random_.choice((raw.hex(), base64.b64encode(raw).decode()))
            text = frame.format(b=blob)
            yield Text(text, "benign_hard", "written_blob", f"written_blob/{frame}")


def _ordered(trigger: str, order: str) -> str:
    return trigger.replace("{o}", order).replace("{O}", order[0].upper() + order[1:] + ".")


def _filled(random_: random.Random, text: str) -> str:
    """``{p}``, ``{m}``, ``{h}`` and ``{a}`` replaced; ``{d}`` stays."""
    parts = _parts("attacks")["injection"]
    fill: Mapping[str, Callable[[], str]] = {
        "{p}": lambda: random_.choice(parts["people"]),
        "{m}": lambda: random_.choice(parts["mails"]),
        "{h}": lambda: random_.choice(parts["hosts"]),
        "{a}": lambda: str(random_.randint(11, 980)),
    }
    for name, draw in fill.items():
        text = text.replace(name, draw())
    return text


_RECIPES = (
    _requests,
    _jailbreaks,
    _injections,
    _agents,
    _documents,
    _roles,
    _hard,
    _topics,
    _private,
    _programs,
    _past,
    _daily,
    _languages,
    _blobs,
)


def _cased(random_: random.Random, text: str) -> str:
    return text if random_.random() < 0.75 else text.lower().rstrip(".?")


def _flat(lists: Iterable[Sequence[str]]) -> list[str]:
    return [text for one in lists for text in one]


@cache
def _parts(name: str) -> dict[str, Any]:
    with (_FOLDER / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)
