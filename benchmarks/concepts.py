"""A concept from ten sentences is told apart from its siblings: AUROC over 20 held-out concepts.

    .venv/bin/python benchmarks/concepts.py [--dev] [--only venice ...] [--json]

Five places, people, topics and styles each, ten sentences to learn from. Each is tested on
twenty other sentences against the eighty of its four siblings (places against places) and forty
neutral ones; `siblings` is the AUROC against the siblings alone, `means` that of the plain
difference of means at the same layer, `told` what the product itself says of its quality, which
it knows from the ten sentences alone. `found` and `alarms` are shares at the calibrated
threshold: of the positives, and of the neutral sentences. All sentences were written for this
benchmark; everything was tuned on the eight concepts of `--dev`.

Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fortpoint import config
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features.concepts.discriminant import largest
from fortpoint.features.concepts.examples import Examples
from fortpoint.features.concepts.learn import Settings, learn
from fortpoint.features.concepts.quality import auroc
from fortpoint.features.concepts.reading import Rows, read, tokenize
from peers import figures

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"
MODEL = ROOT / ".test-home" / "models" / "smollm2-135m"
GOAL = 0.97


@dataclass(frozen=True)
class Subject:
    """One concept of the benchmark."""

    name: str
    kind: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    concept: str
    kind: str
    layer: int
    auroc: float
    siblings: float
    means: float
    told: float
    found: float
    alarms: float
    seconds: float


def subjects(path: Path) -> list[Subject]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys((row["concept"], row["kind"]) for row in rows)

    def texts(name: str, part: str) -> tuple[str, ...]:
        return tuple(r["text"] for r in rows if (r["concept"], r["part"]) == (name, part))

    return [Subject(n, kind, texts(n, "train"), texts(n, "test")) for n, kind in names]


class Bench:
    """One model for all concepts."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = ChatTokenizer.load(model)
        self.stream = ResidualStream(load_model(model, config.Engine()))
        self.neutral = (DATA / "neutral_sentences.txt").read_text(encoding="utf-8").splitlines()

    def measure(self, subject: Subject, others: Sequence[Subject]) -> Found:
        start = time.perf_counter()
        concept = learn(Examples(subject.train), self.tokenizer, self.stream, Settings())
        seconds = time.perf_counter() - start
        siblings = [text for other in others for text in other.test]
        texts = [*subject.test, *siblings, *self.neutral]
        rows = self.rows(texts, concept.layer)
        scores = concept.scores(rows, len(texts))
        plain = largest((rows.x @ concept.writer).astype(np.float64), rows.text, len(texts))
        n, m = len(subject.test), len(subject.test) + len(siblings)
        return Found(
            concept=subject.name,
            kind=subject.kind,
            layer=concept.layer,
            auroc=auroc(scores[:n], scores[n:]),
            siblings=auroc(scores[:n], scores[n:m]),
            means=auroc(plain[:n], plain[n:]),
            told=concept.quality.auroc.value,
            found=float((scores[:n] > 0).mean()),
            alarms=float((scores[m:] > 0).mean()),
            seconds=seconds,
        )

    def rows(self, texts: Sequence[str], layer: int) -> Rows:
        tokenized = tokenize(texts, self.tokenizer, self.stream.max_context)
        ((_, rows),) = read(tokenized, self.stream, (layer,))
        return rows


def run(bench: Bench, all_subjects: Sequence[Subject], only: Sequence[str]) -> Iterator[Found]:
    for subject in all_subjects:
        if not only or subject.name in only:
            kind = [s for s in all_subjects if s.kind == subject.kind and s != subject]
            yield bench.measure(subject, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="the eight that all was tuned on")
    parser.add_argument("--only", nargs="+", default=(), help="these concepts")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    machine = figures.machine()
    if not options.json:
        print(f"{machine['hardware']}, commit {machine['commit']}")
        print("concept             layer  AUROC siblings  means   told  found alarms  seconds")
    name = "concepts_dev.jsonl" if options.dev else "concepts.jsonl"
    found = []
    for one in run(Bench(options.model), subjects(DATA / name), options.only):
        found.append(one)
        if not options.json:
            print(
                f"{one.concept:<20}{one.layer:>4}{one.auroc:>8.3f}{one.siblings:>9.3f}"
                f"{one.means:>7.3f}{one.told:>7.3f}{one.found:>7.0%}{one.alarms:>7.1%}"
                f"{one.seconds:>8.1f}",
                flush=True,
            )
    median = statistics.median(one.auroc for one in found)
    if options.json:
        print(json.dumps({**machine, "median": median, "concepts": [asdict(o) for o in found]}))
        return
    least = min(found, key=lambda one: one.auroc)
    print(
        f"median AUROC {median:.4f} (goal {GOAL}: {'met' if median >= GOAL else 'missed'}), "
        f"least {least.auroc:.3f} ({least.concept}); of the plain difference of means "
        f"{statistics.median(one.means for one in found):.4f}; found "
        f"{statistics.mean(one.found for one in found):.0%}, false alarms "
        f"{statistics.mean(one.alarms for one in found):.1%}"
    )


if __name__ == "__main__":
    main()
