"""Text of the dictionary's corpus that the harvest it learned from did not reach.

    .venv/bin/python benchmarks/unseen_text.py CORPUS.jsonl.gz --out unseen.jsonl.gz

The harvest takes whole documents in an order that its seed fixes, until it has its tokens; what
comes after them was neither learned from nor looked at for labels. To be harvested in turn:

    fortpoint features harvest unseen.jsonl.gz --layer 9 --out unseen
"""

from __future__ import annotations

import argparse
import gzip
import random
from pathlib import Path

import msgspec

from fortpoint.engine.chat import ChatTokenizer
from fortpoint.features import corpus

MODEL = Path(__file__).resolve().parent.parent / ".test-home" / "models" / "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the harvest")
    parser.add_argument("--after", type=int, default=5_000_000, help="tokens of the harvest")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--model", type=Path, default=MODEL)
    chosen = parser.parse_args()
    tokenizer = ChatTokenizer.load(chosen.model)
    rows = list(corpus.read_rows(chosen.corpus))
    random.Random(chosen.seed).shuffle(rows)
    n_seen = n_kept = 0
    with gzip.open(chosen.out, "wb", compresslevel=3) as out:
        for row in rows:
            size = len(corpus.tokenize(row, tokenizer))
            if n_seen < chosen.after:
                n_seen += size
            elif n_kept < chosen.tokens:
                n_kept += size
                out.write(msgspec.json.encode(row, order=None) + b"\n")
            else:
                break
    print(f"{n_kept} tokens after the first {n_seen}, in {chosen.out}")


if __name__ == "__main__":
    main()
