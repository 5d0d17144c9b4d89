"""Writes the text that the shipped dictionary learns from: prose, code and conversations.

    python -m training.dictionary_corpus --data ../shared/data --out corpus.jsonl.gz

Texts are taken as they are. Conversations are dialogues of two and single requests, so that
the chat template's tokens and instructions are learned too; of near-duplicate requests one is
taken, and only of those that may shape what ships.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

_TURN = re.compile(r"\n\n(Human|Assistant): ")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MAX_REQUEST_CHARS = 4000


def rows(data: Path) -> Iterator[dict[str, Any]]:
    """Every text and conversation, as ``fortpoint features harvest`` takes them."""
    for row in _lines(data / "text.jsonl.gz"):
        yield {"text": row["text"]}
    for row in _lines(data / "preferences.jsonl.gz"):
        messages = _dialogue(row["chosen"])
        if messages:
            yield {"messages": messages}
    seen: set[object] = set()
    for row in _lines(data / "prompts.jsonl.gz"):
        if row["may_train_shipped"] and row["cluster"] not in seen:
            seen.add(row["cluster"])
            text = row["text"][:_MAX_REQUEST_CHARS]
            yield {"messages": [{"role": "user", "content": text}]}


def _dialogue(text: str) -> list[dict[str, str]]:
    parts = _TURN.split(text)[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in turns if said.strip()]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line)


def write(data: Path, target: Path) -> int:
    """All rows, gzipped; the file appears whole or not at all. Returns how many there are."""
    partial = target.with_name(target.name + ".partial")
    n = 0
    with gzip.open(partial, "wb", compresslevel=3) as out:
        for row in rows(data):
            out.write(msgspec.json.encode(row) + b"\n")
            n += 1
    os.replace(partial, target)
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--out", type=Path, required=True, help="JSONL, gzipped")
    arguments = parser.parse_args()
    n = write(arguments.data, arguments.out)
    print(f"{n} texts and conversations in {arguments.out}")


if __name__ == "__main__":
    main()
