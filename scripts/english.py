"""Rewrite the guard's table of English: letter pairs and frequent words.

    .venv/bin/python scripts/english.py TEXT.jsonl.gz PROMPTS.jsonl.gz

Letter pairs are counted in texts of the public domain, words in those and in the prompts whose
licence lets them shape what ships. Both files are gzipped JSONL with a ``text`` in each row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fortpoint.guard.obfuscation.english import FILE

PUBLIC_DOMAIN = {"nltk_state_union", "nltk_inaugural", "jargon", "factbook"}
N_WORDS = 16_000
MIN_COUNT = 6
SHORT = re.compile(r"a|i|[dg]o|[bhmw]e|i[fnst]|a[mnst]|o[fhknr]|[bm]y|hi|no|so|to|u[ps]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def main() -> None:
    chosen = _arguments()
    pairs = np.ones((27, 27))
    words: Counter[str] = Counter()
    for row in _rows(chosen.text):
        if row["source"] in PUBLIC_DOMAIN:
            _count(row["text"], words)
            _pair(row["text"], pairs)
    for row in _rows(chosen.prompts):
        if row["may_train_shipped"]:
            _count(row["text"], words)
    table = {"pairs": _quantised(pairs), "words": " ".join(_frequent(words))}
    partial = FILE.with_suffix(".partial")
    partial.write_bytes(gzip.compress(json.dumps(table).encode(), 9, mtime=0))
    partial.replace(FILE)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("prompts", type=Path)
    return parser.parse_args()


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _count(text: str, words: Counter[str]) -> None:
    """Each text counts a word once, so that no text decides by repeating itself."""
    words.update({word.replace("'", "") for word in _WORD.findall(text.lower())})


def _pair(text: str, pairs: np.ndarray) -> None:
    letters = re.sub(r"[^a-z]+", "{", text.lower()).encode()
    codes = np.frombuffer(letters, np.uint8) - 97
    np.add.at(pairs, (codes[:-1], codes[1:]), 1)


def _quantised(pairs: np.ndarray) -> list[str]:
    """Of each letter (then the gap), tenths of a nat of -log p(next), as printable characters."""
    nats = -np.log(pairs / pairs.sum(axis=1, keepdims=True))
    tenths = np.minimum(np.rint(nats * 10), 90).astype(int)
    return ["".join(chr(33 + value) for value in row) for row in tenths]


def _frequent(words: Counter[str]) -> list[str]:
    kept = [
        word
        for word, count in words.most_common()
        if count >= MIN_COUNT and (len(word) > 2 or SHORT.fullmatch(word))
    ]
    return kept[:N_WORDS]


if __name__ == "__main__":
    main()
