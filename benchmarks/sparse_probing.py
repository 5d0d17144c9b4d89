"""A dictionary's one and five best features classify at least as well as the stream's coordinates.

    .venv/bin/python benchmarks/sparse_probing.py FOLDER [FOLDER ...] [--json FILE]

k-sparse probing after SAEBench (arXiv 2503.09532): a text is the mean over its tokens (sinks
left out) of the residual stream, or of the dictionary's activations; the k columns whose means
differ most between the classes in training are chosen, a logistic regression is fitted on them,
and its accuracy counted on texts of other documents. The raw stream's k best coordinates at the
same layer stand beside it, and a regression on the whole stream as the bound. Thirteen tasks of
two classes in equal parts, made of ../shared/data and of a list of given names. Chosen columns
are brought to unit variance first, so that the regression's penalty favours no unit.

Takes about four minutes on two cores, and scikit-learn.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from fortpoint import config
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features.sae import Dictionary
from peers import figures

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"
MODEL = ROOT / ".test-home" / "models" / "smollm2-135m"
SHARED = ROOT.parent / "shared" / "data"

MAX_TOKENS = 64
EACH_CLASS = 300
FOLDS = 5
SINK_NORM = 10.0  # in medians
KS = (1, 5)

Rows = list[tuple[str, str]]  # a text, and the document that it must not be parted from


@dataclass(frozen=True)
class Task:
    """Two classes of texts."""

    name: str
    first: Rows
    second: Rows

    def texts(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Texts, labels and numbers of documents; as many of one class as of the other."""
        n = min(len(self.first), len(self.second), EACH_CLASS)
        source = random.Random(self.name)
        rows = source.sample(self.first, n) + source.sample(self.second, n)
        numbers = {document: i for i, document in enumerate(sorted({row[1] for row in rows}))}
        groups = np.array([numbers[document] for _, document in rows])
        return [text for text, _ in rows], np.arange(2 * n) < n, groups


@dataclass(frozen=True)
class Accuracy:
    """Of one dictionary on one task; means over folds."""

    task: str
    dictionary: str
    n: int
    raw: dict[int, float]
    features: dict[int, float]
    whole: float


class Sources:
    """The texts of ../shared/data by where they come from."""

    def __init__(self, folder: Path) -> None:
        self._texts: dict[str, list[str]] = defaultdict(list)
        for row in _rows(folder / "text.jsonl.gz"):
            self._texts[row["source"]].append(row["text"])
        self._prompts: dict[str, Rows] = defaultdict(list)
        for row in _rows(folder / "prompts.jsonl.gz"):
            kept = (row["text"], f"{row['cluster']}")
            self._prompts[row["label"]].append(kept)
            self._prompts[row["dataset"]].append(kept)

    def prompts(self, label: str) -> Rows:
        """Of a label or a data set; near-duplicates share a document."""
        return self._prompts[label]

    def snippets(self, source: str, n_chars: int = 320) -> Rows:
        """A piece from inside each text, so that its layout does not give it away."""
        found = []
        for number, text in enumerate(self._texts[source]):
            start = text.find(" ", min(len(text) // 3, 2000)) + 1
            piece = " ".join(text[start : start + n_chars].split())
            if len(piece) > 60:
                found.append((piece, f"{source} {number}"))
        return found

    def matches(self, source: str, pattern: str, per_text: int = 3) -> Rows:
        """``text`` of each match of ``pattern``, up to so many of a document."""
        found = []
        for number, text in enumerate(self._texts[source]):
            matches = itertools.islice(re.finditer(pattern, text, re.MULTILINE), per_text)
            found += [(" ".join(m["text"].split()), f"{source} {number}") for m in matches]
        return [(text, document) for text, document in found if len(text) > 15]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def names(gender: str) -> Rows:
    """Sentences about a person of a given name, without a pronoun."""
    frames = ("My neighbour {} came to tea.", "The parcel is for {}.", "{} will be late today.")
    lines = (DATA / "given_names.txt").read_text(encoding="utf-8").splitlines()
    given = [line.split()[1] for line in lines if line.startswith(gender)]
    return [(frame.format(name), name) for name in given for frame in frames]


def tasks(sources: Sources) -> list[Task]:
    gloss = r"^.{2,60} \(%s\): (?P<text>[^\"\n;]{20,200})"
    noun, verb = (sources.matches("wordnet", gloss % kind) for kind in "nv")
    adjective = sources.matches("wordnet", gloss % "[as]")
    mark = r"\[%s[123]\](?:\[\w+\]|,[^#\n]*)*##(?P<text>[^\n]{25,300})"
    liked, disliked = (
        sources.matches("nltk_product_reviews_1", mark % sign, 8) for sign in (r"\+", "-")
    )
    turn = r"^%s: (?P<text>[^\n]{25,300})"
    user, assistant = (
        sources.matches("sgd_dialogues", turn % who, 1) for who in ("User", "Assistant")
    )
    return [
        Task("noun / verb gloss", noun, verb),
        Task("noun / adjective gloss", noun, adjective),
        Task("liked / disliked product", liked, disliked),
        Task("user / assistant turn", user, assistant),
        Task("Python / prose", sources.snippets("python_stdlib"), sources.snippets("wikipedia")),
        Task(
            "film review / speech",
            *map(sources.snippets, ("nltk_movie_reviews", "nltk_state_union")),
        ),
        Task("Shakespeare / Genesis", *map(sources.snippets, ("nltk_shakespeare", "nltk_genesis"))),
        Task("computing / encyclopaedia", *map(sources.snippets, ("foldoc", "wikipedia"))),
        Task("sum in words / instruction", *map(sources.prompts, ("gsm8k", "alpaca_instructions"))),
        Task("banking / other question", *map(sources.prompts, ("banking77", "clinc_oos"))),
        Task("harmful / harmless request", *map(sources.prompts, ("harmful_request", "benign"))),
        Task("jailbreak / harmless request", *map(sources.prompts, ("jailbreak", "benign"))),
        Task("woman's / man's name", names("f"), names("m")),
    ]


class Reader:
    """Mean residual streams and mean activations of texts."""

    def __init__(self, model: Path, dictionaries: Sequence[Dictionary]) -> None:
        self._tokenizer = ChatTokenizer.load(model)
        self._stream = ResidualStream(load_model(model, config.Engine()))
        self._dictionaries = dictionaries
        self._layers = sorted({one.layer for one in dictionaries})

    def means(self, texts: Sequence[str]) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
        """``[n, d_model]`` by layer, and ``[n, d_sae]`` by dictionary."""
        streams: dict[int, list[np.ndarray]] = defaultdict(list)
        acts: dict[str, list[np.ndarray]] = defaultdict(list)
        for start in range(0, len(texts), 64):
            batch = [self._tokens(text) for text in texts[start : start + 64]]
            seen = self._stream.read(batch, self._layers)
            ends = np.cumsum([len(tokens) for tokens in batch])
            kept = {layer: self._kept(x, ends) for layer, x in seen.items()}
            text_of = np.repeat(np.arange(len(batch)), [len(tokens) for tokens in batch])
            for layer, x in seen.items():
                streams[layer].append(_mean(x[kept[layer]], text_of[kept[layer]]))
            for one in self._dictionaries:
                rows = kept[one.layer]
                acts[one.name].append(_mean(one.encode(seen[one.layer][rows]), text_of[rows]))
        joined = {layer: np.concatenate(parts) for layer, parts in streams.items()}
        return joined, {name: np.concatenate(parts) for name, parts in acts.items()}

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode_text("\n" + text[: 8 * MAX_TOKENS])[:MAX_TOKENS]

    @staticmethod
    def _kept(x: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Rows that are neither a text's first token nor of outsized norm."""
        norms = np.linalg.norm(x, axis=1)
        sound = norms <= SINK_NORM * np.median(norms)
        sound[[0, *ends[:-1]]] = False
        return np.flatnonzero(sound)


def _mean(x: np.ndarray, text_of: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(text_of, prepend=-1))
    return np.add.reduceat(x, starts, axis=0) / np.diff([*starts, len(x)])[:, None]


def chosen(x: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The k columns whose means differ most between the classes (SAEBench's rule)."""
    apart = np.abs(x[labels].mean(axis=0) - x[~labels].mean(axis=0))
    return np.argsort(-apart, kind="stable")[:k]


def accuracy(
    x: np.ndarray, labels: np.ndarray, groups: np.ndarray, columns: Callable[..., np.ndarray]
) -> float:
    """Mean over folds; ``columns`` chooses from the training part."""
    hits = []
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, test in split.split(x, labels, groups):
        own = columns(x[train], labels[train])
        center, scale = x[train][:, own].mean(axis=0), x[train][:, own].std(axis=0) + 1e-9
        model = LogisticRegression(max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit((x[train][:, own] - center) / scale, labels[train])
        hits.append(model.score((x[test][:, own] - center) / scale, labels[test]))
    return float(np.mean(hits))


def measure(task: Task, reader: Reader, dictionaries: Sequence[Dictionary]) -> Iterator[Accuracy]:
    texts, labels, groups = task.texts()
    streams, acts = reader.means(texts)

    def best(x: np.ndarray) -> dict[int, float]:
        return {k: accuracy(x, labels, groups, lambda own, y, k=k: chosen(own, y, k)) for k in KS}

    for one in dictionaries:
        stream = streams[one.layer]
        whole = accuracy(stream, labels, groups, lambda own, y: np.arange(own.shape[1]))
        features = best(acts[one.name])
        yield Accuracy(task.name, one.name, len(texts), best(stream), features, whole)


def load(folders: Sequence[Path]) -> list[Dictionary]:
    stream_shape = json.loads((MODEL / "config.json").read_bytes())
    d_model, n_layers = stream_shape["hidden_size"], stream_shape["num_hidden_layers"]
    return [Dictionary.load(folder, d_model, n_layers) for folder in folders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="dictionaries, as SAELens writes")
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    machine = figures.machine()
    print(f"{machine['hardware']}, commit {machine['commit']}")
    dictionaries = load(options.folders)
    reader = Reader(MODEL, dictionaries)
    print(f"{'task':<30}{'dictionary':<22}   n  raw 1   ours 1   raw 5   ours 5   whole stream")
    found = []
    for task in tasks(Sources(options.data)):
        for one in measure(task, reader, dictionaries):
            found.append(one)
            show(one)
    for dictionary in dictionaries:
        own = [one for one in found if one.dictionary == dictionary.name]
        show(mean(own))
    if options.json:
        options.json.write_text(json.dumps({**machine, "tasks": [asdict(o) for o in found]}))


def mean(found: Sequence[Accuracy]) -> Accuracy:
    def over(figure: Callable[[Accuracy], float]) -> float:
        return float(np.mean([figure(one) for one in found]))

    raw = {k: over(lambda one, k=k: one.raw[k]) for k in KS}
    features = {k: over(lambda one, k=k: one.features[k]) for k in KS}
    whole, n = over(lambda one: one.whole), sum(one.n for one in found)
    return Accuracy(f"mean of {len(found)} tasks", found[0].dictionary, n, raw, features, whole)


def show(one: Accuracy) -> None:
    print(
        f"{one.task:<30}{one.dictionary:<22}{one.n:>5}{one.raw[1]:>7.3f}{one.features[1]:>9.3f}"
        f"{one.raw[5]:>8.3f}{one.features[5]:>9.3f}{one.whole:>15.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
