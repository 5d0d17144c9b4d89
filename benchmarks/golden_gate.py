"""Golden Gate: turned up, the concept is in most answers to neutral questions, which stay sane.

    .venv/bin/python benchmarks/golden_gate.py [--quick] [--json FILE]

A hundred neutral questions, sixty tokens an answer, temperature 0. `present` is the share of
answers that name the bridge, San Francisco or the bay; `ratio` the perplexity that the model
without steering gives to the answers, over that of its own answers; `distinct` the share of
different three-word sequences, since a loop surprises no model. The concept is learned from
twenty sentences at several layers. Layers alone and together, both modes and both scopes are
tried at several strengths on a fifth of the questions; the best are measured on all. A plain
system prompt stands beside them. At the end, a transcript at three strengths.

Takes about fifteen minutes on two cores, `--quick` three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fortpoint import config
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.offline import Offline
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.engine.steered_answers import SteeredAnswers
from fortpoint.features.concepts.examples import Examples, read_lines
from fortpoint.features.concepts.learn import Settings, learn
from fortpoint.features.concepts.sweep import (
    MAX_RATIO,
    MIN_SHARE,
    Point,
    Report,
    Setting,
    by_terms,
    recommend,
    sweep,
)
from fortpoint.features.directions import Direction
from fortpoint.features.library import Library
from peers import figures

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"
MODEL = ROOT / ".test-home" / "models" / "smollm2-135m"
TERMS = ("golden gate", "bridge", "bridges", "san francisco", "the bay", "bay area")
SYSTEM = "Always talk about the Golden Gate Bridge."
TOKENS = 60

GROUPS = ((8,), (10,), (12,), (14,), (16,), (9, 14), (8, 12, 16), (10, 12, 14))
"""Layers that are turned together."""

STRENGTHS = {1: (1.0, 1.25, 1.5, 1.75), 2: (0.5, 0.6, 0.7, 0.8), 3: (0.4, 0.5, 0.6, 0.7)}
"""By how many layers are turned: each adds its part."""

ANSWER_STRENGTHS = (1.5, 2.0)
FINE = (0.93, 1.0, 1.07)
"""Around the best settings of the first look."""

N_BEST = 4


class Bench:
    """The model, and the concept at every layer under the names ``golden-gate-<layer>``."""

    def __init__(self, model: Path, layers: Sequence[int]) -> None:
        tokenizer = ChatTokenizer.load(model)
        loaded = load_model(model, config.Engine())
        stream = ResidualStream(loaded)
        examples = Examples(read_lines(DATA / "golden_gate.txt"))
        directions: dict[str, Direction] = {}
        for layer in layers:
            name = f"golden-gate-{layer}"
            concept = learn(examples, tokenizer, stream, Settings(layers=(layer,)))
            directions[name] = concept.direction(name, model.name)
        self.engine = Offline(loaded, tokenizer, Library({}, directions), config.Engine())
        self.answers = SteeredAnswers(self.engine, TOKENS)
        self.present = by_terms(TERMS)

    def sweep(self, questions: Sequence[str], settings: Sequence[Setting]) -> Report:
        return sweep(self.answers, questions, settings, self.present, _tell)


def _tell(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def settings(groups: Sequence[tuple[int, ...]]) -> list[Setting]:
    """Every group of layers in each mode at each strength; single ones on the answer alone too."""
    found = []
    for layers in groups:
        targets = tuple(f"golden-gate-{layer}" for layer in layers)
        for strength in STRENGTHS[len(layers)]:
            found += [Setting(targets, strength, mode) for mode in ("clamp", "add")]
        if len(layers) == 1:
            found += [Setting(targets, s, "clamp", "answer") for s in ANSWER_STRENGTHS]
    return found


def refine(own: Point, points: Sequence[Point]) -> list[Setting]:
    """The best settings of the first look, a little weaker and stronger."""

    def worth(point: Point) -> float:
        lacks = max(0.0, MIN_SHARE - point.present.value) + max(0.0, point.ratio / MAX_RATIO - 1)
        return point.distinct / own.distinct - 3 * lacks

    best = sorted(points, key=worth, reverse=True)[:N_BEST]
    return [
        msgspec.structs.replace(point.setting, strength=round(point.setting.strength * factor, 3))
        for point in best
        for factor in FINE
    ]


def line(name: str, point: Point) -> str:
    return (
        f"{name:<34}{point.present.value:>7.0%} [{point.present.low:.0%}, {point.present.high:.0%}]"
        f"{point.perplexity:>8.2f}{point.ratio:>7.2f}{point.median_ratio:>8.2f}"
        f"{point.distinct:>9.2f}"
    )


def shown(setting: Setting) -> str:
    layers = ", ".join(target.rpartition("-")[2] for target in setting.targets)
    return f"layer {layers} {setting.mode} {setting.scope} {setting.strength:g}"


def transcript(bench: Bench, best: Setting, questions: Sequence[str]) -> list[dict[str, object]]:
    """Three answers of the model itself, and at a little less, as much and a little more."""
    asked = questions[::33][:3]
    told = []
    for factor in (0.0, 0.75, 1.0, 1.4):
        setting = msgspec.structs.replace(best, strength=best.strength * factor)
        setting = setting if factor else Setting()
        for question, answer in zip(asked, bench.answers.answers(asked, setting), strict=True):
            told.append({"strength": setting.strength, "question": question, "answer": answer})
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="groups of layers only, 20 questions")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    machine = figures.machine()
    print(f"{machine['hardware']}, commit {machine['commit']}", flush=True)
    questions = list(read_lines(DATA / "neutral_questions.txt"))
    groups = GROUPS[5:] if options.quick else GROUPS
    bench = Bench(options.model, sorted({layer for group in groups for layer in group}))
    coarse = bench.sweep(questions[::5], settings(groups))
    chosen = [*refine(coarse.own, coarse.points), Setting(system=SYSTEM)]
    fine = bench.sweep(questions[:: 5 if options.quick else 1], chosen)
    prompt, *points = sorted(fine.points, key=lambda point: point.setting.system is None)
    best = recommend(fine.own, points)
    report(fine, prompt, points, best)
    found = {**machine, "coarse": coarse, "fine": fine, "best": best}
    turned = best or max(points, key=lambda point: point.present.value / point.ratio)
    found["transcript"] = transcript(bench, turned.setting, questions)
    tell(found["transcript"])
    bench.engine.close()
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


def report(fine: Report, prompt: Point, points: Sequence[Point], best: Point | None) -> None:
    print(f"{'setting':<34}present          perplexity  ratio  median  distinct")
    print(line("the model itself", fine.own))
    print(line("system prompt", prompt))
    for point in sorted(points, key=lambda one: (one.setting.targets, one.setting.strength)):
        print(line(shown(point.setting), point))
    verdict = "missed" if best is None else f"met by {shown(best.setting)}"
    print(f"goal: present >= {MIN_SHARE:.0%} at a ratio under {MAX_RATIO:g}: {verdict}")


def tell(told: Sequence[dict[str, object]]) -> None:
    for one in told:
        print(f"\n[{one['strength']}] {one['question']}\n  {json.dumps(one['answer'])}")


if __name__ == "__main__":
    main()
