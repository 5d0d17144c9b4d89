"""What the log can show of itself: checkpoints, proofs, one request's entry, cosignatures.

    prover = Prover(database, log.verifier_key, witnesses)
    (await prover.inclusion(17)).path
    shown = await prover.of_request("req_...")       # entry, proof and checkpoint belong together

Each answer is read in one transaction. A proof to a signed size is verified before it is handed
out; a log that was changed gives ``VerificationError``, not a proof that nobody accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, select

from fortpoint.audit.checkpoint import Checkpoint, VerifierKey
from fortpoint.audit.cosignature import WitnessKey
from fortpoint.audit.entry import Content
from fortpoint.audit.proofs import (
    check_consistency,
    consistency_proof,
    inclusion_proof,
    inclusion_root,
    root_hash,
)
from fortpoint.audit.stored_tree import StoredTree
from fortpoint.errors import ConfigError, InvalidRequest, NotFound, VerificationError
from fortpoint.store.database import Database
from fortpoint.store.tables import (
    audit_checkpoints,
    audit_contents,
    audit_cosignatures,
    audit_entries,
)

KEPT_COSIGNED = 256  # sizes

_NEWEST = select(audit_checkpoints.c.note).order_by(audit_checkpoints.c.size.desc()).limit(1)
_COSIGNED = (
    select(audit_cosignatures.c.size)
    .group_by(audit_cosignatures.c.size)
    .having(func.count() >= bindparam("witnesses"))
    .order_by(audit_cosignatures.c.size.desc())
    .limit(1)
)
_LINES = (
    select(audit_cosignatures.c.note, audit_cosignatures.c.line)
    .where(audit_cosignatures.c.size == bindparam("at_size"))
    .order_by(audit_cosignatures.c.key_id)
)
_FOUND = (
    select(audit_contents, audit_entries.c.entry, audit_entries.c.leaf_hash)
    .join(audit_entries, audit_entries.c.index == audit_contents.c.index)
    .where(audit_contents.c.request_id == bindparam("wanted"))
    .order_by(audit_contents.c.index)
    .limit(1)
)
_LEAF = select(audit_entries.c.leaf_hash).where(audit_entries.c.index == bindparam("at"))
_PAGE = (
    select(audit_entries)
    .where(audit_entries.c.index >= bindparam("start"))
    .order_by(audit_entries.c.index)
    .limit(bindparam("n"))
)


class Inclusion(msgspec.Struct, frozen=True):
    """That ``leaf_hash`` is at ``index`` in the tree of ``size`` entries. All hexadecimal."""

    index: int
    size: int
    leaf_hash: str
    root_hash: str
    path: tuple[str, ...]


class Consistency(msgspec.Struct, frozen=True):
    """That the tree of ``old_size`` entries is the start of the one of ``new_size``."""

    old_size: int
    new_size: int
    old_root: str
    new_root: str
    path: tuple[str, ...]


class Leaf(msgspec.Struct, frozen=True):
    """One entry as the log holds it: its very bytes, which are JSON, and its place."""

    index: int
    leaf_hash: str
    entry: str


class Proven(msgspec.Struct, frozen=True):
    """An entry, the proof that it is in the log, the checkpoint that the proof leads to.

    ``content`` is None where there never was any, or where it was erased.
    """

    leaf: Leaf
    size: int
    path: tuple[str, ...]
    checkpoint: str
    content: Content | None


def known_witnesses(texts: Sequence[str]) -> tuple[WitnessKey, ...]:
    """``audit.witnesses``, parsed. Raises ``ConfigError``."""
    try:
        return tuple(WitnessKey.parse(text) for text in texts)
    except VerificationError as error:
        raise ConfigError(f"audit.witnesses: {error.message}") from None


class Prover:
    """Reads one log; ``witnesses`` are those whose cosignatures it takes."""

    def __init__(
        self, database: Database, key: VerifierKey, witnesses: Sequence[WitnessKey] = ()
    ) -> None:
        self._database = database
        self._key = key
        self._witnesses = tuple(witnesses)

    async def checkpoint(self, witnesses: int = 0) -> bytes:
        """The newest checkpoint, or the newest one that so many witnesses cosigned.

        Raises ``NotFound`` where there is none.
        """
        return await self._database.read(lambda connection: _checkpoint(connection, witnesses))

    async def inclusion(self, index: int, size: int | None = None) -> Inclusion:
        """Raises ``InvalidRequest`` for what the log has not, ``VerificationError``."""

        def read(connection: Connection) -> Inclusion:
            newest = self._newest(connection)
            wanted = newest.size if size is None else size
            _check_range(index < wanted <= newest.size, newest.size)
            found = connection.execute(_LEAF, {"at": index}).scalar_one_or_none()
            root, path = self._proof(connection, index, wanted, found, newest)
            return Inclusion(index, wanted, (found or b"").hex(), root.hex(), _hexadecimal(path))

        return await self._database.read(read)

    async def consistency(self, old: int, new: int | None = None) -> Consistency:
        """Raises ``InvalidRequest`` for what the log has not, ``VerificationError``."""

        def read(connection: Connection) -> Consistency:
            newest = self._newest(connection)
            wanted = newest.size if new is None else new
            _check_range(0 <= old <= wanted <= newest.size, newest.size)
            tree = StoredTree(connection)
            path = consistency_proof(old, wanted, tree.node)
            roots = root_hash(old, tree.node), root_hash(wanted, tree.node)
            check_consistency(old, roots[0], wanted, roots[1], path)
            if wanted == newest.size and roots[1] != newest.root_hash:
                raise VerificationError(_DAMAGED)
            return Consistency(old, wanted, roots[0].hex(), roots[1].hex(), _hexadecimal(path))

        return await self._database.read(read)

    async def of_request(self, request_id: str, witnesses: int = 0) -> Proven:
        """The first entry of this request. Raises ``NotFound``, ``VerificationError``.

        With ``witnesses``, the proof leads to a checkpoint that so many cosigned.
        """

        def read(connection: Connection) -> Proven:
            row = connection.execute(_FOUND, {"wanted": request_id.encode()}).first()
            if row is None:
                raise NotFound("the log has no entry of this request")
            note = _checkpoint(connection, witnesses)
            signed = self._key.open_checkpoint(note)
            index = row[0]  # a row has an ``index`` of its own
            if index >= signed.size:
                raise NotFound("no witness has seen this entry yet; try again in some seconds")
            _, path = self._proof(connection, index, signed.size, row.leaf_hash, signed)
            leaf = Leaf(index, row.leaf_hash.hex(), row.entry.decode())
            kept = row.salt is not None
            content = Content(row.salt, row.request, row.response) if kept else None
            return Proven(leaf, signed.size, _hexadecimal(path), note.decode(), content)

        return await self._database.read(read)

    async def entries(self, start: int, limit: int) -> tuple[Leaf, ...]:
        """In the order of the log."""

        def read(connection: Connection) -> tuple[Leaf, ...]:
            rows = connection.execute(_PAGE, {"start": start, "n": limit}).all()
            return tuple(
                Leaf(index, leaf.hex(), entry.decode(errors="replace"))
                for index, leaf, entry in rows
            )

        return await self._database.read(read)

    async def add_cosignature(self, note: bytes) -> tuple[str, ...]:
        """Keep the lines that known witnesses put under one of our checkpoints; their names.

        Raises ``InvalidRequest`` where the note is not ours or has no line of theirs, or one
        that does not verify.
        """
        try:
            signed = self._key.open_checkpoint(note)
            found = [(key, line) for key in self._witnesses if (line := key.line_of(note))]
            for key, _ in found:
                key.open(note)
        except VerificationError as error:
            raise InvalidRequest(f"the cosigned checkpoint: {error.message}") from None
        if not found:
            raise InvalidRequest("no line by a witness that this log knows (audit.witnesses)")
        own = _own_part(note, self._key)
        await self._database.write(lambda connection: _keep(connection, signed, own, found))
        return tuple(key.name for key, _ in found)

    def _newest(self, connection: Connection) -> Checkpoint:
        return self._key.open_checkpoint(_checkpoint(connection, 0))

    def _proof(
        self, connection: Connection, index: int, size: int, leaf: bytes | None, signed: Checkpoint
    ) -> tuple[bytes, list[bytes]]:
        """The root and the path to it; where ``size`` is the signed one, they must agree."""
        path = inclusion_proof(index, size, StoredTree(connection).node)
        root = inclusion_root(leaf or b"", index, size, path)
        if size == signed.size and root != signed.root_hash:
            raise VerificationError(_DAMAGED)
        return root, path


_DAMAGED = "the log is not the one that was signed; run `fortpoint audit verify`"


def _checkpoint(connection: Connection, witnesses: int) -> bytes:
    if not witnesses:
        note: bytes | None = connection.execute(_NEWEST).scalar_one_or_none()
        if note is None:
            raise NotFound("the log has no entries yet, so there is no checkpoint")
        return note
    size = connection.execute(_COSIGNED, {"witnesses": witnesses}).scalar_one_or_none()
    if size is None:
        raise NotFound(f"no checkpoint has been cosigned by {witnesses} witnesses yet")
    rows = connection.execute(_LINES, {"at_size": size}).all()
    return bytes(rows[0].note) + b"".join(row.line + b"\n" for row in rows)


def _own_part(note: bytes, key: VerifierKey) -> bytes:
    """The checkpoint with our signature line only."""
    text, _, signatures = note.decode().rpartition("\n\n")
    ours = [line for line in signatures.split("\n") if key.signed(line)]
    return "\n".join([text, "", *ours, ""]).encode()


def _keep(
    connection: Connection,
    signed: Checkpoint,
    note: bytes,
    lines: Sequence[tuple[WitnessKey, str]],
) -> None:
    table = audit_cosignatures
    newest = connection.execute(select(func.max(audit_checkpoints.c.size))).scalar_one() or 0
    if signed.size > newest:
        raise InvalidRequest("this checkpoint is not of this log as it is here")
    if root_hash(signed.size, StoredTree(connection).node) != signed.root_hash:
        raise InvalidRequest("this checkpoint is signed with the log's key, and is another history")
    for key, line in lines:
        same = (table.c.size == signed.size, table.c.key_id == key.key_id.hex())
        connection.execute(delete(table).where(*same))
        row = {"size": signed.size, "key_id": key.key_id.hex(), "note": note, "line": line.encode()}
        connection.execute(insert(table), [row])
    oldest = (
        select(table.c.size).distinct().order_by(table.c.size.desc()).offset(KEPT_COSIGNED).limit(1)
    )
    if (size := connection.execute(oldest).scalar_one_or_none()) is not None:
        connection.execute(delete(table).where(table.c.size <= size))


def _check_range(inside: bool, newest: int) -> None:
    if not inside:
        raise InvalidRequest(f"the log has {newest} entries, counted from 0")


def _hexadecimal(path: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(one.hex() for one in path)
