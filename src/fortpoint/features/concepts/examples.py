"""The sentences that show a concept, from files that a person wrote: all checked beforehand.

A file is text with a sentence a line, or JSONL (``.jsonl``) with ``{"text": "..."}`` a line.

    examples = read(Path("bridge.txt"), Path("other-bridges.txt"))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fortpoint.errors import InvalidRequest

MIN_POSITIVES = 5
MAX_POSITIVES = 200
MAX_NEGATIVES = 2000
MAX_CHARS = 2000
_MAX_FILE_BYTES = 8 * 1024 * 1024


class _Row(msgspec.Struct, frozen=True):
    text: str


@dataclass(frozen=True)
class Examples:
    """``positives`` are about the concept, ``negatives`` (there may be none) are not.

    Raises ``InvalidRequest`` for too few or too many, for empty, overlong or repeated ones, and
    for one that is on both sides.
    """

    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_count(len(self.positives))
        if len(self.negatives) > MAX_NEGATIVES:
            raise InvalidRequest(f"at most {MAX_NEGATIVES} negatives are taken", param="negatives")
        _check("positive", self.positives)
        _check("negative", self.negatives)
        both = {_key(text) for text in self.positives} & {_key(text) for text in self.negatives}
        if both:
            raise InvalidRequest(
                f"{len(both)} of the sentences are positive and negative at once, the first of "
                f"them {min(both)[:60]!r}: a concept is what one side has and the other has not",
                param="negatives",
            )


def read(positives: Path, negatives: Path | None = None) -> Examples:
    """Both files. Raises ``InvalidRequest`` naming the file and line that is at fault."""
    return Examples(read_lines(positives), () if negatives is None else read_lines(negatives))


def read_lines(path: Path) -> tuple[str, ...]:
    """One text a line, blanks around it taken away."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{path.name} cannot be read: {error.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidRequest(f"{path.name} is larger than {_MAX_FILE_BYTES} bytes")
    return tuple(_lines(path, content))


def digest(texts: Sequence[str]) -> str:
    """``sha256:<hex>`` of the texts in their order: says which they were, not what they say."""
    return "sha256:" + hashlib.sha256(msgspec.json.encode(list(texts))).hexdigest()


def _lines(path: Path, content: bytes) -> Iterator[str]:
    decoder = msgspec.json.Decoder(_Row)
    for number, line in enumerate(content.splitlines(), start=1):
        where = f"{path.name}, line {number}"
        try:
            text = decoder.decode(line).text if path.suffix == ".jsonl" else line.decode()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            wanted = '{"text": "..."}' if path.suffix == ".jsonl" else "text in UTF-8"
            raise InvalidRequest(f"{where} is not {wanted}") from None
        if not text.strip():
            raise InvalidRequest(f"{where} is empty; delete it or write a sentence there")
        yield text.strip()


def _check_count(n: int) -> None:
    if n == 1:
        raise InvalidRequest(
            "one example shows everything that it says, not a concept; "
            f"write at least {MIN_POSITIVES}, better ten, that share nothing else",
            param="positives",
        )
    if not MIN_POSITIVES <= n <= MAX_POSITIVES:
        raise InvalidRequest(
            f"a concept is learned from {MIN_POSITIVES} to {MAX_POSITIVES} positive sentences, "
            f"these are {n}",
            param="positives",
        )


def _check(kind: str, texts: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InvalidRequest(f"{kind} sentence {number} is empty")
        if len(text) > MAX_CHARS:
            raise InvalidRequest(
                f"{kind} sentence {number} has {len(text)} characters, more than {MAX_CHARS}; "
                "give the sentence that is about the concept, not the whole text"
            )
        first = seen.setdefault(_key(text), number)
        if first != number:
            raise InvalidRequest(
                f"{kind} sentences {first} and {number} are the same; a repeated example "
                "would be held out and learned from at once"
            )


def _key(text: str) -> str:
    return " ".join(text.split())
