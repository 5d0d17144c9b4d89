"""Search among the shipped features: fifty things, written down before any feature had a label.

    .venv/bin/python benchmarks/feature_search.py --harvest UNSEEN --dictionary FOLDER [--json FILE]

The harvest is of text that the dictionary did not learn from (``unseen_text.py``). A feature is
right for a query when, of the twenty tokens there on which it is strongest, at least half have the
thing in sight: the query's pattern (``data/feature_queries.jsonl``) matches
the token or the eight before it. The search itself knows nothing of the patterns. A query for
which no feature of the dictionary is right counts as missed, and is named.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from fortpoint.cli.features_engine import opened
from fortpoint.features.activations import ActivationStore, widen
from fortpoint.features.sae import Dictionary
from fortpoint.features.training.measure import Coder
from peers import figures

QUERIES = Path(__file__).parent / "data" / "feature_queries.jsonl"
STRONGEST = 20
BEFORE = 8
ROWS = 2048


def main() -> None:
    chosen = _arguments()
    queries = [json.loads(line) for line in QUERIES.read_text().splitlines()]
    store = ActivationStore(chosen.harvest)
    dictionary = Dictionary.load(chosen.dictionary, store.plan.d_model, 1000)
    with opened(store.plan.model) as engine:
        right = _right(dictionary, store, engine.tokenizer, queries)
    search = _searcher(chosen.dictionary)
    rows = []
    for query, own in zip(queries, right, strict=True):
        found = search(query["query"])[:5]
        place = next((i for i, index in enumerate(found) if index in own), None)
        rows.append({"query": query["query"], "found": found, "place": place, "right": len(own)})
    _print(rows, chosen.json)


def _right(dictionary, store, tokenizer, queries) -> list[set[int]]:
    """Of each query, the features that are right for it."""
    coder, d_sae = Coder(dictionary), dictionary.n_features
    best = torch.zeros(STRONGEST, d_sae)
    where = torch.full((STRONGEST, d_sae), -1)
    texts: list[str] = []
    for shard in store.shards:
        offset = len(texts)
        texts += _sights(shard, tokenizer)
        kept = store.kept(shard, dictionary.layer)
        bits = shard.bits(dictionary.layer)
        for first in range(0, len(kept), ROWS):
            rows = kept[first : first + ROWS]
            acts = coder.acts(widen(bits[rows]))
            places = torch.from_numpy(offset + rows)[:, None].expand(-1, d_sae)
            best, order = torch.cat([best, acts]).topk(STRONGEST, dim=0)
            where = torch.cat([where, places]).gather(0, order)
    active, where = (best > 0).numpy(), where.numpy()
    enough = active.sum(axis=0) >= STRONGEST // 2
    found = []
    for query in queries:
        pattern = re.compile(query["pattern"])
        hits = np.array([pattern.search(text) is not None for text in texts])
        share = (hits[where] & active).sum(axis=0) / np.maximum(active.sum(axis=0), 1)
        # A pattern that is everywhere would make every feature right: it must stand out.
        found.append(set(np.flatnonzero(enough & (share >= max(0.5, 2 * hits.mean())))))
    return found


def _sights(shard, tokenizer) -> list[str]:
    """Of each token, the text from eight tokens before it up to itself."""
    pieces = {int(token): tokenizer.decode([int(token)]) for token in np.unique(shard.tokens)}
    shown = [pieces[int(token)] for token in shard.tokens]
    return [
        "".join(shown[max(i - min(BEFORE, int(position)), 0) : i + 1])
        for i, position in enumerate(shard.position)
    ]


def _searcher(folder: Path):
    from fortpoint.features.understanding.index import Index
    from fortpoint.features.understanding.search import Search

    search = Search(Index.load(folder))
    return lambda words: [hit.feature for hit in search.words(words, 5)]


def _print(rows: list[dict], path: Path | None) -> None:
    for name, value in figures.machine().items():
        print(f"{name:<9} {value}")
    n_found = sum(row["place"] is not None for row in rows)
    n_there = sum(row["right"] > 0 for row in rows)
    for row in rows:
        place = "missed" if row["place"] is None else f"place {row['place'] + 1}"
        print(f"{row['query']:<36} {place:<9} {row['right']:4} right features")
    print(f"\n{n_found} of {len(rows)} in the top five; for {n_there} there is a right feature")
    if path:
        path.write_text(json.dumps(figures.machine() | {"queries": rows}, default=int))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--harvest", type=Path, required=True)
    parser.add_argument("--dictionary", type=Path, required=True, help="its folder")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
