"""Verifies a whole log and names the first entry that is not as it was recorded.

The plan, for every entry in order:

1. It is the next one: indices run from 0 without a gap.
2. Its leaf hash is the hash of its bytes, and its bytes say the same index.
3. Where a checkpoint has this size, its signature verifies, its columns say what was signed,
   and its root is the root over all entries so far.
4. The nodes that proofs are made of are those of this tree.

and at the end:

5. The newest checkpoint covers exactly the entries there are.
6. A checkpoint that the auditor kept elsewhere, if given, has the root the log had then.

    report = verify(home / "fortpoint.db", load_public(home))
    report.entries

What this cannot show: a home that was put back to an older state as a whole, unless step 6
is given something to compare with; and a history signed anew by whoever holds the private
key, for which the same holds. ``scripts/verify_audit.py`` does the same with none of this
code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
from sqlalchemy import URL

from fortpoint.audit.checkpoint import Checkpoint, VerifierKey
from fortpoint.audit.entry import unseal
from fortpoint.audit.merkle import Frontier, Node, leaf_hash
from fortpoint.audit.snapshot import CheckpointRow, EntryRow, NodeRow, Unreadable, snapshot_of
from fortpoint.errors import VerificationError

Progress = Callable[[int, int], None]
_PROGRESS_EVERY = 1000
_MAX_NAMED_CHARS = 80
_IDENTITY = tuple(
    re.compile(rb'"%s":"((?:[^"\\\\]|\\\\.){0,200})"' % name) for name in (b"time", b"request_id")
)


class Report(msgspec.Struct, frozen=True):
    """A log that verified: ``entries`` under ``root`` (hexadecimal), all signed by ``origin``."""

    origin: str
    entries: int
    checkpoints: int
    root: str


def verify(
    where: Path | URL,
    key: VerifierKey,
    *,
    kept: Checkpoint | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Verify the log in an SQLite file or on a server. Raises ``VerificationError``.

    The error's ``param`` is ``entries[n]`` where one entry can be named. ``kept`` is an older
    checkpoint, already opened with ``key``. ``on_progress`` gets entries done and in all.
    """
    with snapshot_of(where) as snapshot:
        total = snapshot.newest_size() if on_progress else 0
        entries = _counted(snapshot.entries(), total, on_progress)
        return check(entries, snapshot.checkpoints(), snapshot.nodes(), key, kept)


def check(
    entries: Iterable[EntryRow],
    checkpoints: Iterable[CheckpointRow],
    nodes: Iterable[NodeRow],
    key: VerifierKey,
    kept: Checkpoint | None = None,
) -> Report:
    """The rules, apart from where the rows come from. Raises ``VerificationError``."""
    walk = _Walk(key, kept, iter(checkpoints), iter(nodes))
    walk.compare_kept()
    try:
        for row in entries:
            walk.step(row)
    except Unreadable as damage:
        _bad(f"{damage.message}; {walk.last_good()}", walk.frontier.size)
    return walk.finish()


class _Walk:
    """Where the verification is: the tree so far, and up to where a checkpoint vouches."""

    def __init__(
        self,
        key: VerifierKey,
        kept: Checkpoint | None,
        checkpoints: Iterator[CheckpointRow],
        nodes: Iterator[NodeRow],
    ) -> None:
        self.key = key
        self.kept = kept
        self.frontier = Frontier()
        self.vouched = 0  # entries under a good checkpoint
        self.n_checkpoints = 0
        self._checkpoints = checkpoints
        self._nodes = nodes
        self._next = self._advance()
        self._last: EntryRow | None = None

    def step(self, row: EntryRow) -> None:
        leaf = self._check_entry(row)
        made: list[Node] = []
        self.frontier = self.frontier.grow((leaf,), made)
        self._last = row
        for node in made:
            self._check_node(node)
        size = self.frontier.size
        if self._next is not None and self._next.size == size:
            self._check_checkpoint(self._next)
            self._next = self._advance()
        elif self._next is not None and not _follows(self._next.size, size):
            _bad(f"a checkpoint has the impossible size {_named(self._next.size)}", self.vouched)
        self.compare_kept()

    def finish(self) -> Report:
        size = self.frontier.size
        if self._next is not None:
            if not _follows(self._next.size, size):
                _bad(f"a checkpoint has the impossible size {_named(self._next.size)}", size)
            _bad(
                f"entry {size} is missing: a checkpoint covers {self._next.size} entries, "
                f"the log ends after {size}; {self.last_good()}",
                size,
            )
        if self.vouched != size:
            _bad(
                f"{_span(self.vouched, size)} under no checkpoint: "
                "added without the log's key, or the checkpoint was removed",
                self.vouched,
            )
        if self.kept is not None and self.kept.size > size:
            _bad(
                f"entry {size} is missing: the checkpoint that was kept covers "
                f"{self.kept.size} entries, the log ends after {size}",
                size,
            )
        if (stray := self._next_node()) is not None:
            _bad(f"the tree has a node too many, {_named(stray.number)}: proofs are wrong", size)
        root = self.frontier.root().hex()
        return Report(self.key.name, size, self.n_checkpoints, root)

    def compare_kept(self) -> None:
        """Step 5."""
        if self.kept is None or self.kept.size != self.frontier.size:
            return
        if self.kept.root_hash != self.frontier.root():
            raise VerificationError(
                f"the log is not the one of the checkpoint that was kept: one of its first "
                f"{self.kept.size} entries is different"
            )

    def last_good(self) -> str:
        if self._last is None:
            return "no entry before it could be verified"
        return f"the last good entry is {_name(self._last)}"

    def _check_entry(self, row: EntryRow) -> bytes:
        """Steps 1 and 2. Returns the leaf hash."""
        expected = self.frontier.size
        if row.index != expected:
            _bad(
                f"entry {expected} is missing: the next one is {_name(row)}; {self.last_good()}",
                expected,
            )
        if row.entry is None:
            _bad(f"entry {expected} was changed: it is too large to be one", expected)
        leaf = leaf_hash(row.entry)
        if row.leaf_hash != leaf:
            _bad(f"{_name(row)} was changed: its hash does not match", expected)
        try:
            sealed = unseal(row.entry)
        except ValueError as error:
            _bad(f"entry {expected} was changed: it is {error}", expected)
        if sealed.index != expected:
            _bad(
                f"{_name(row)} was moved or replaced: its bytes are those of entry {sealed.index}",
                expected,
            )
        return leaf

    def _check_checkpoint(self, row: CheckpointRow) -> None:
        """Step 3."""
        size = self.frontier.size
        what = f"the checkpoint over {_entries(self.vouched, size)}"
        try:
            signed = self.key.open_checkpoint(row.note or b"")
        except VerificationError as error:
            _bad(f"{what} was changed: {error.message}", self.vouched)
        if signed.size != size or row.root_hash != signed.root_hash:
            _bad(f"{what} was changed: it does not say what was signed", self.vouched)
        if self.frontier.root() != signed.root_hash:
            _bad(
                f"{_span(self.vouched, size)} not as recorded: changed together with the hash, "
                "and the signed checkpoint over them does not match",
                self.vouched,
            )
        if row.frontier != self.frontier.to_bytes():
            _bad(f"{what} was changed: its stored frontier does not match", self.vouched)
        self.vouched = size
        self.n_checkpoints += 1

    def _check_node(self, node: Node) -> None:
        """Step 4."""
        row = self._next_node()
        stored = None if row is None else (row.height, row.number, row.hash)
        if stored != (node.height, node.number, node.hash):
            start = node.number << node.height
            _bad(
                f"the tree's node over {_entries(start, start + (1 << node.height))} was changed "
                "or is missing: proofs are wrong, the entries are as recorded",
                start,
            )

    def _next_node(self) -> NodeRow | None:
        try:
            return next(self._nodes, None)
        except Unreadable as damage:
            _bad(f"the tree's nodes: {damage.message}", self.frontier.size)

    def _advance(self) -> CheckpointRow | None:
        try:
            return next(self._checkpoints, None)
        except Unreadable as damage:
            _bad(
                f"the checkpoints after entry {self.vouched - 1}: {damage.message}"
                if self.vouched
                else f"the checkpoints: {damage.message}",
                self.vouched,
            )


def _counted(rows: Iterator[EntryRow], total: int, progress: Progress | None) -> Iterator[EntryRow]:
    if progress is None:
        yield from rows
        return
    done = 0
    for done, row in enumerate(rows, start=1):
        yield row
        if done % _PROGRESS_EVERY == 0:
            progress(done, total)
    progress(done, done)


def _follows(size: object, current: int) -> bool:
    return isinstance(size, int) and size > current


def _bad(message: str, index: int) -> NoReturn:
    raise VerificationError(message, param=f"entries[{index}]")


def _entries(start: int, end: int) -> str:
    return f"entry {start}" if end - start == 1 else f"entries {start} to {end - 1}"


def _span(start: int, end: int) -> str:
    if end - start == 1:
        return f"entry {start} is"
    return f"{_entries(start, end)} (the first of them is {start}) are"


def _name(row: EntryRow) -> str:
    """``entry 17 (2026-..., request id req_...)``, as far as its bytes still say so."""
    index = _named(row.index)
    # Searched for, not parsed: the byte that was changed may be one of the JSON's own. A quote
    # inside a text is escaped, so that a text cannot pose as a key.
    said = [pattern.search(row.entry or b"") for pattern in _IDENTITY]
    if said[0] is None or said[1] is None:
        return f"entry {index}"
    when, request_id = (_named(found[1].decode(errors="replace")) for found in said if found)
    return f"entry {index} ({when}, request id {request_id})"


def _named(value: object) -> str:
    # Somebody may have chosen these bytes to deceive a terminal.
    text = str(value)[:_MAX_NAMED_CHARS]
    return "".join(character if character.isprintable() else "?" for character in text)
