#!/usr/bin/env python3
"""Verifies a Fort Point audit log without any of Fort Point's code.

    python verify_audit.py fortpoint.db --key audit.pub [--checkpoint kept.txt]

Needs Python 3.11 and `cryptography`. An auditor who does not trust the operator reads this
one file instead of the product. It opens the database read-only and checks, entry by entry:

1. Entries are numbered 0, 1, 2, ... without a gap.
2. Each leaf hash is SHA-256(0x00 || entry) (RFC 9162, 2.1.1), and the entry, which is JSON,
   gives its own number as "index".
3. Each checkpoint is a C2SP signed note by the given key, its root is the Merkle root over
   the entries up to its size, and the newest one covers every entry.
4. A checkpoint kept from an earlier day, if given, has the root that the log had then.

Get the key and an older checkpoint from somewhere other than the operator's machine: with
nothing to compare, an older copy of the whole log verifies as well.

Prints one line and exits 0, or names the first bad entry and exits 1.
"""

import argparse
import base64
import binascii
import hashlib
import json
import sqlite3
import sys
from pathlib import Path
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_BYTES = 16 * 1024 * 1024


class Bad(Exception):
    """The log is not as it was recorded; the message says where."""


def sha256(data):
    return hashlib.sha256(data).digest()


def decode64(text):
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Bad("base64 that cannot be read") from None
    if base64.b64encode(data).decode() != text:
        raise Bad("base64 in an unusual spelling")
    return data


def parse_key(text):
    """C2SP verifier key: name+hexadecimal id+base64(0x01 || public key)."""
    parts = text.strip().split("+", 2)
    key = decode64(parts[2]) if len(parts) == 3 else b""
    if len(key) != 33 or key[0] != 1:
        raise Bad("the key is not an Ed25519 verifier key")
    key_id = sha256(parts[0].encode() + b"\n" + key)[:4]
    if key_id.hex() != parts[1]:
        raise Bad("the key's id does not match its name and key")
    return parts[0], key_id, Ed25519PublicKey.from_public_bytes(key[1:])


def open_checkpoint(note, key):
    """(size, root) of a signed checkpoint."""
    name, key_id, public = key
    try:
        text, blank, signatures = (note or b"").decode().rpartition("\n\n")
    except UnicodeDecodeError:
        raise Bad("it is not UTF-8") from None
    if not blank or not signatures.endswith("\n"):
        raise Bad("it is not a signed note")
    text += "\n"
    signed = False
    for line in signatures[:-1].split("\n"):
        prefix = f"\N{EM DASH} {name} "
        if line.startswith(prefix):
            data = decode64(line[len(prefix) :])
            if data[:4] == key_id:
                try:
                    public.verify(data[4:], text.encode())
                except InvalidSignature:
                    raise Bad("its signature does not verify") from None
                signed = True
    if not signed:
        raise Bad("it has no signature by the log's key")
    lines = text.split("\n")
    if len(lines) < 4 or lines[0] != name or not (lines[1].isascii() and lines[1].isdigit()):
        raise Bad("it is not a checkpoint of this log")
    return int(lines[1][:19]), decode64(lines[2])


class Tree:
    """The roots of the perfect subtrees at the right edge, largest first."""

    def __init__(self):
        self.size, self.edge = 0, []

    def append(self, leaf):
        size = self.size
        while size & 1:
            leaf = sha256(b"\x01" + self.edge.pop() + leaf)
            size >>= 1
        self.edge.append(leaf)
        self.size += 1

    def root(self):
        if not self.edge:
            return sha256(b"")
        root = self.edge[-1]
        for left in reversed(self.edge[:-1]):
            root = sha256(b"\x01" + left + root)
        return root


def connect(path):
    name = f"file:{quote(str(path.absolute()))}"
    for query in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"{name}?{query}", uri=True, isolation_level=None)
        try:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            # Immutable ignores the write-ahead log, so there must be nothing in it.
            wal = path.with_name(path.name + "-wal")
            connection.close()
            if "immutable" in query or (wal.exists() and wal.stat().st_size):
                raise
    raise Bad("the database cannot be opened")


def check_entry(expected, row):
    index, stored_hash, entry = row
    if index != expected:
        raise Bad(f"entry {expected} is missing: the next one is entry {index}")
    if not isinstance(entry, bytes):
        raise Bad(f"entry {expected} was changed: it is too large")
    leaf = sha256(b"\x00" + entry)
    try:
        said = json.loads(entry)
        name = f"entry {index} ({said['entry']['time']}, request id {said['entry']['request_id']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        said, name = None, f"entry {index}"
    if stored_hash != leaf:
        raise Bad(f"{ascii(name)[1:-1]} was changed: its hash does not match")
    if said is None:
        raise Bad(f"{name} was changed: it cannot be read")
    if said.get("index") != expected:
        raise Bad(f"{ascii(name)[1:-1]} was moved or replaced")
    return leaf


def verify(connection, key, kept):
    """The number of entries. Raises Bad and sqlite3.Error."""
    entries = connection.execute(
        'SELECT "index", CAST(substr(leaf_hash, 1, 64) AS BLOB),'
        " CASE WHEN length(entry) <= ? THEN CAST(entry AS BLOB) END"
        ' FROM audit_entries ORDER BY "index"',
        (MAX_BYTES,),
    )
    checkpoints = connection.execute(
        "SELECT size, CAST(substr(root_hash, 1, 64) AS BLOB), CAST(substr(note, 1, 16384) AS BLOB)"
        " FROM audit_checkpoints ORDER BY size"
    )
    tree, vouched, checkpoint = Tree(), 0, checkpoints.fetchone()
    try:
        for row in entries:
            tree.append(check_entry(tree.size, row))
            if checkpoint and checkpoint[0] == tree.size:
                check_checkpoint(tree, vouched, checkpoint, key)
                vouched, checkpoint = tree.size, checkpoints.fetchone()
            if kept and kept[0] == tree.size and kept[1] != tree.root():
                raise Bad(f"the first {kept[0]} entries are not those of the kept checkpoint")
    except sqlite3.Error as error:
        raise Bad(f"the file is damaged after {tree.size} good entries: {error}") from None
    if checkpoint:
        raise Bad(f"entry {tree.size} is missing: a checkpoint covers {checkpoint[0]!r} entries")
    if vouched != tree.size:
        raise Bad(f"entry {vouched} and what follows it is under no checkpoint")
    if kept and kept[0] > tree.size:
        raise Bad(f"entry {tree.size} is missing: the kept checkpoint covers {kept[0]} entries")
    return tree.size


def check_checkpoint(tree, vouched, row, key):
    span = f"entries {vouched} to {tree.size - 1}"
    try:
        size, root = open_checkpoint(row[2], key)
    except Bad as error:
        raise Bad(f"the checkpoint over {span} was changed: {error}") from None
    if size != tree.size or root != row[1]:
        raise Bad(f"the checkpoint over {span} was changed: it does not say what was signed")
    if root != tree.root():
        raise Bad(f"entry {vouched} or a later one of {span} is not as recorded")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("database", type=Path)
    parser.add_argument("--key", type=Path, required=True, help="file with the verifier key")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint kept from an earlier day")
    arguments = parser.parse_args()
    try:
        key = parse_key(arguments.key.read_text(encoding="utf-8"))
        kept = arguments.checkpoint and open_checkpoint(arguments.checkpoint.read_bytes(), key)
        connection = connect(arguments.database)
        try:
            size = verify(connection, key, kept)
        finally:
            connection.close()
    except Bad as error:
        sys.exit(f"NOT VERIFIED: {error}")
    except (OSError, UnicodeDecodeError, sqlite3.Error) as error:
        sys.exit(f"NOT VERIFIED: {error}")
    print(f"verified: {size} entries of {key[0]}")


if __name__ == "__main__":
    main()
