"""Text and conversations for harvesting, from JSONL files: what was read, token by token.

A line is ``{"text": "..."}`` or ``{"messages": [{"role", "content"}, ...]}``; other keys are
ignored, and a file may be gzipped. A line that is neither is refused with its number, so that a
wrong file is not harvested half.

    documents = read(["text.jsonl.gz", "chats.jsonl"], tokenizer, seed=0)
    documents[0].tokens, documents[0].roles  # int32 [n], uint8 [n]: indices of ROLES
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest
from fortpoint.types import Message, Role, Segment

ROLES = tuple(Role)
MAX_LINE_BYTES = 8 * 1024 * 1024


class Row(msgspec.Struct, frozen=True):
    """One line: exactly one of ``text`` and ``messages``."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None


class Prompted(Protocol):
    """Tokens, and the segments that cover them in order."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...


class Tokenizer(Protocol):
    """What is needed of the engine's ``ChatTokenizer``."""

    def chat(self, messages: Sequence[Message]) -> Prompted: ...

    def text(self, text: str) -> Prompted: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class Document:
    """``tokens`` int32 ``[n]`` and who wrote each: ``roles`` uint8 ``[n]``, places in ``ROLES``."""

    tokens: NDArray[np.int32]
    roles: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tokens)


def read(
    files: Sequence[Path], tokenizer: Tokenizer, seed: int = 0, max_tokens: int | None = None
) -> list[Document]:
    """All documents of ``files`` in an order that depends on ``seed`` alone.

    With ``max_tokens``, as many of them as have so many tokens. Raises ``InvalidRequest`` for a
    file or a line that cannot be read.
    """
    rows = [row for file in files for row in read_rows(file)]
    random.Random(seed).shuffle(rows)  # noqa: S311
    documents, n_tokens = [], 0
    for row in rows:
        if max_tokens is not None and n_tokens >= max_tokens:
            break
        document = tokenize(row, tokenizer)
        if len(document) > 1:
            documents.append(document)
            n_tokens += len(document)
    return documents


def tokenize(row: Row, tokenizer: Tokenizer) -> Document:
    """Raises ``InvalidRequest`` for messages that the model's chat template does not take."""
    if row.messages is not None:
        prompt = tokenizer.chat(row.messages)
    else:
        prompt = tokenizer.text(row.text or "")
    roles = np.empty(len(prompt.tokens), np.uint8)
    for segment in prompt.segments:
        roles[segment.start : segment.end] = ROLES.index(segment.role)
    return Document(np.array(prompt.tokens, np.int32), roles)


def read_rows(file: Path) -> Iterator[Row]:
    """The file's rows. Raises ``InvalidRequest`` with the number of a line that is none."""
    decoder = msgspec.json.Decoder(Row)
    try:
        with _opened(file) as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield _row(line, decoder, f"{file.name}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise InvalidRequest(f"{file.name} cannot be read: {reason}") from None


def _opened(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    return file.open("rb")


def _row(line: bytes, decoder: msgspec.json.Decoder[Row], where: str) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequest(f"{where} is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(f"{where} is not {{text}} or {{messages}}") from None
    if (row.text is None) == (row.messages is None):
        raise InvalidRequest(f"{where} must have exactly one of text and messages")
    if row.messages is not None and (
        not row.messages or any(m.role is Role.TEMPLATE for m in row.messages)
    ):
        raise InvalidRequest(f"{where}: a message's role is system, user, assistant or tool")
    return row
