#!/usr/bin/env python3
"""Verifies a Fort Point audit log, or one proof from it, without any of Fort Point's code.

    python verify_audit.py log fortpoint.db --key audit.pub [--checkpoint kept.txt]
    python verify_audit.py log exported.jsonl --key audit.pub
    python verify_audit.py proof proof.json --key audit.pub [--witness witness.pub]...
                                            [--request body.json] [--response answer.json]

Needs Python 3.11 or newer and nothing else. Who does not trust the operator reads this one file
instead of the product. What it checks:

log    1. Entries are numbered 0, 1, 2, ... without a gap, and each, which is JSON, gives its own
          number as "index".
       2. Leaf hashes are SHA-256(0x00 || entry) (RFC 9162, 2.1.1).
       3. Each checkpoint is a C2SP signed note by the given key, its root is the Merkle root over
          the entries up to its size, and the newest one covers every entry.
       4. A checkpoint kept from an earlier day, if given, has the root that the log had then.
proof  1. The checkpoint is signed by the given key, and cosigned by every witness that is given.
       2. The inclusion proof leads from the entry to the checkpoint's root (RFC 9162, 2.1.3.2).
       3. The entry gives its own number; with the salt, its hashes are those of what was asked
          and answered, where the proof or --request and --response have that.

Get the keys and an older checkpoint from somewhere other than the operator's machine: with
nothing to compare, an older copy of the whole log verifies as well.

Prints one line (with --json an object) and exits 0, or says what is wrong and exits 1.
"""

import argparse
import base64
import binascii
import hashlib
import json
import re
import sqlite3
import sys
from pathlib import Path
from urllib.parse import quote

MAX_BYTES = 16 * 1024 * 1024
MAX_NOTE_BYTES = 16 * 1024
LOG, WITNESS = 1, 4  # signature types of signed-note


class Bad(Exception):
    """It is not as it was recorded; the message says where."""


def sha256(data):
    return hashlib.sha256(data).digest()


P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
BASE_Y = 4 * pow(5, P - 2, P) % P


def recover_x(y, sign):
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    if square == 0:
        return None if sign else 0
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return P - x if x & 1 != sign else x


def add(a, b):
    e = (a[1] - a[0]) * (b[1] - b[0]) % P
    f = (a[1] + a[0]) * (b[1] + b[0]) % P
    g = 2 * a[3] * b[3] * D % P
    h = 2 * a[2] * b[2] % P
    x, y, z, t = f - e, h - g, h + g, f + e
    return x * y % P, z * t % P, y * z % P, x * t % P


BASE = (recover_x(BASE_Y, 0), BASE_Y, 1, recover_x(BASE_Y, 0) * BASE_Y % P)


def times(scalar, point):
    result = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point = add(point, point)
        scalar >>= 1
    return result


def encode_point(point):
    inverse = pow(point[2], P - 2, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def ed25519_holds(public, signature, message):
    """RFC 8032, 5.1.7, in the strict sense: S is below the group's order."""
    y = int.from_bytes(public, "little")
    x = recover_x(y & (1 << 255) - 1, y >> 255)
    s = int.from_bytes(signature[32:], "little")
    if x is None or s >= ORDER or len(signature) != 64:
        return False
    y &= (1 << 255) - 1
    digest = hashlib.sha512(signature[:32] + public + message).digest()
    k = int.from_bytes(digest, "little") % ORDER
    minus = (P - x, y, 1, (P - x) * y % P)
    return encode_point(add(times(s, BASE), times(k, minus))) == signature[:32]


def decode64(text):
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Bad("base64 that cannot be read") from None
    if base64.b64encode(data).decode() != text:
        raise Bad("base64 in an unusual spelling")
    return data


def parse_key(text, kind):
    """(name, key id, public key) of name+hexadecimal id+base64(type || public key)."""
    parts = text.strip().split("+", 2)
    key = decode64(parts[2]) if len(parts) == 3 else b""
    if len(key) != 33 or key[0] != kind:
        raise Bad("this is not an Ed25519 verifier key" if kind == LOG else "not a witness's key")
    key_id = sha256(parts[0].encode() + b"\n" + key)[:4]
    if key_id.hex() != parts[1]:
        raise Bad("the key's id does not match its name and key")
    return parts[0], key_id, key[1:]


def split_note(note):
    if len(note) > MAX_NOTE_BYTES:
        raise Bad("it is too long for a signed note")
    try:
        text, blank, signatures = note.decode().rpartition("\n\n")
    except UnicodeDecodeError:
        raise Bad("it is not UTF-8") from None
    if not blank or not signatures.endswith("\n"):
        raise Bad("it is not a signed note")
    return text + "\n", signatures[:-1].split("\n")


def signatures_by(key, lines):
    """The data behind the key id in each line by this key."""
    prefix = f"\N{EM DASH} {key[0]} "
    found = [decode64(line[len(prefix) :]) for line in lines if line.startswith(prefix)]
    return [data[4:] for data in found if data[:4] == key[1]]


def open_checkpoint(note, key):
    """(size, root) of a signed checkpoint."""
    text, lines = split_note(note or b"")
    found = signatures_by(key, lines)
    if not found:
        raise Bad("it has no signature by the log's key")
    if not all(ed25519_holds(key[2], signature, text.encode()) for signature in found):
        raise Bad("its signature does not verify")
    said = text.split("\n")
    if len(said) < 4 or said[0] != key[0] or not re.fullmatch("0|[1-9][0-9]{0,18}", said[1], re.A):
        raise Bad("it is not a checkpoint of this log")
    root = decode64(said[2])
    if len(root) != 32:
        raise Bad("its root is not a SHA-256 hash")
    return int(said[1]), root


def cosigned_at(note, key):
    """When (seconds since 1970) this witness cosigned (C2SP tlog-cosignature/v1)."""
    text, lines = split_note(note)
    found = signatures_by(key, lines)
    if not found:
        raise Bad(f"the checkpoint is not cosigned by {key[0]}")
    when = int.from_bytes(found[0][:8], "big")
    message = f"cosignature/v1\ntime {when}\n{text}".encode()
    if len(found[0]) != 72 or not ed25519_holds(key[2], found[0][8:], message):
        raise Bad(f"the cosignature by {key[0]} does not verify")
    return when


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


def inclusion_root(leaf, index, size, path):
    """RFC 9162, 2.1.3.2."""
    number, last, root = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise Bad("the inclusion proof has too many hashes")
        if number & 1 or number == last:
            root = sha256(b"\x01" + sibling + root)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            root = sha256(b"\x01" + root + sibling)
        number, last = number >> 1, last >> 1
    if last:
        raise Bad("the inclusion proof has too few hashes")
    return root


class Walk:
    """Takes entries and checkpoints in their order; says no at the first that is wrong."""

    def __init__(self, key, kept):
        self.key, self.kept = key, kept
        self.tree, self.vouched = Tree(), 0
        self.compare_kept()

    def entry(self, index, entry, stored_hash=None):
        """``stored_hash`` is only in a database."""
        expected = self.tree.size
        if index is not None and index != expected:
            raise Bad(f"entry {expected} is missing: the next one is entry {index}")
        if not isinstance(entry, bytes) or len(entry) > MAX_BYTES:
            raise Bad(f"entry {expected} was changed: it is too large")
        leaf = sha256(b"\x00" + entry)
        name, said = self.named(expected, entry)
        if stored_hash is not None and stored_hash != leaf:
            raise Bad(f"{name} was changed: its hash does not match")
        if said is None:
            raise Bad(f"{name} was changed: it cannot be read")
        if said != expected or isinstance(said, bool):
            raise Bad(f"{name} was moved or replaced: it says that it is another")
        self.tree.append(leaf)
        self.compare_kept()

    def checkpoint(self, note, stored=None):
        """``stored`` is (size, root) as a database has them beside the note."""
        span = f"entries {self.vouched} to {self.tree.size - 1}"
        try:
            size, root = open_checkpoint(note, self.key)
        except Bad as error:
            raise Bad(f"the checkpoint over {span} was changed: {error}") from None
        if stored is not None and stored != (size, root):
            raise Bad(f"the checkpoint over {span} was changed: it does not say what was signed")
        if size != self.tree.size:
            raise Bad(f"after {self.tree.size} entries a checkpoint covers {size}")
        if root != self.tree.root():
            raise Bad(f"entry {self.vouched} or a later one of {span} is not as recorded")
        self.vouched = size

    def finish(self):
        size = self.tree.size
        if self.vouched != size:
            raise Bad(f"entry {self.vouched} and what follows it is under no checkpoint")
        if self.kept and self.kept[0] > size:
            raise Bad(f"entry {size} is missing: the kept checkpoint covers {self.kept[0]} entries")
        return {"log": self.key[0], "entries": size, "root": self.tree.root().hex()}

    def compare_kept(self):
        if self.kept and self.kept[0] == self.tree.size and self.kept[1] != self.tree.root():
            raise Bad(f"the first {self.kept[0]} entries are not those of the kept checkpoint")

    @staticmethod
    def named(expected, entry):
        try:
            said = json.loads(entry)
            made = said["entry"]
            name = f"entry {expected} ({made['time']}, request id {made['request_id']})"
            return ascii(name)[1:-1], said["index"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return f"entry {expected}", None


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


def walk_database(path, walk):
    connection = connect(path)
    entries = connection.execute(
        'SELECT "index", CAST(substr(leaf_hash, 1, 64) AS BLOB),'
        " CASE WHEN length(entry) <= ? THEN CAST(entry AS BLOB) END"
        ' FROM audit_entries ORDER BY "index"',
        (MAX_BYTES,),
    )
    checkpoints = connection.execute(
        "SELECT size, CAST(substr(root_hash, 1, 64) AS BLOB), CAST(substr(note, 1, 16385) AS BLOB)"
        " FROM audit_checkpoints ORDER BY size"
    )
    checkpoint = checkpoints.fetchone()
    try:
        for index, leaf, entry in entries:
            walk.entry(index, entry, leaf)
            if checkpoint and checkpoint[0] == walk.tree.size:
                walk.checkpoint(checkpoint[2], checkpoint[:2])
                checkpoint = checkpoints.fetchone()
    except sqlite3.Error as error:
        raise Bad(f"the file is damaged after {walk.tree.size} good entries: {error}") from None
    finally:
        connection.close()
    if checkpoint:
        raise Bad(
            f"entry {walk.tree.size} is missing: a checkpoint covers {checkpoint[0]!r} entries"
        )


def walk_export(path, walk):
    """One line for each entry, its very bytes; {"checkpoint":"..."} after the last it covers."""
    with path.open("rb") as file:
        while line := file.readline(MAX_BYTES + 2):
            if not line.endswith(b"\n"):
                raise Bad(f"the file is cut short, or too long a line, at entry {walk.tree.size}")
            if line.startswith(b'{"checkpoint":'):
                walk.checkpoint(exported_note(line, walk.tree.size))
            else:
                walk.entry(None, line[:-1])


def exported_note(line, size):
    try:
        return json.loads(line)["checkpoint"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Bad(f"the checkpoint after {size} entries cannot be read") from None


def verify_log(options):
    key = parse_key(read_text(options.key), LOG)
    kept = options.checkpoint and open_checkpoint(options.checkpoint.read_bytes(), key)
    walk = Walk(key, kept)
    with options.file.open("rb") as file:
        is_database = file.read(16) == b"SQLite format 3\0"
    if is_database or options.file.suffix == ".db":
        walk_database(options.file, walk)
    else:
        walk_export(options.file, walk)
    found = walk.finish()
    return found, f"verified: {found['entries']} entries of {found['log']}"


def verify_proof(options):
    key = parse_key(read_text(options.key), LOG)
    proof = load_proof(options.file)
    note = field(proof, "checkpoint", str).encode()
    size, root = open_checkpoint(note, key)
    witnesses = [parse_key(read_text(path), WITNESS) for path in options.witness]
    cosigned = {witness[0]: cosigned_at(note, witness) for witness in witnesses}
    text = field(proof, "entry", str)
    index = field(proof, "index", int)
    if not 0 <= index < size or field(proof, "size", int) != size:
        raise Bad("the proof is not to the checkpoint that is with it")
    path = [hash_of(one) for one in field(proof, "path", list)]
    leaf = sha256(b"\x00" + text.encode())
    if field(proof, "leaf_hash", str) != leaf.hex():
        raise Bad("the entry was changed: its hash does not match")
    if inclusion_root(leaf, index, size, path) != root:
        raise Bad("the proof does not lead to the checkpoint: the entry is not in that log")
    entry = read_entry(text, index)
    shown = check_content(proof.get("content"), entry, options)
    found = {
        "log": key[0],
        "index": index,
        "size": size,
        "request_id": entry.get("request_id"),
        "time": entry.get("time"),
        "status": entry.get("status"),
        "cosigned": cosigned,
        "content": shown,
    }
    by = f", cosigned by {', '.join(cosigned)}" if cosigned else ""
    what = f", {' and '.join(shown)} as recorded" if shown else ""
    line = f"verified: request {entry.get('request_id')} is entry {index} of {size} of {key[0]}"
    return found, ascii(line + by + what)[1:-1]


def load_proof(path):
    try:
        proof = json.loads(path.read_bytes()[: 4 * MAX_BYTES])
    except (ValueError, RecursionError):
        proof = None
    if not isinstance(proof, dict) or proof.get("object") != "audit.proof":
        raise Bad("this is not a proof (/api/audit/requests/REQUEST_ID)")
    return proof


def field(proof, name, kind):
    value = proof.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Bad(f"the proof has no {name}")
    return value


def hash_of(text):
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise Bad("the proof has a hash that cannot be read")
    return bytes.fromhex(text)


def read_entry(text, index):
    try:
        said = json.loads(text)
        entry = said["entry"]
        if said["index"] != index or isinstance(said["index"], bool):
            raise Bad("the entry is another one's")
        return dict(entry)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Bad("the entry cannot be read") from None


def check_content(content, entry, options):
    """Which of request and response are shown to be those that the entry is bound to."""
    given = {
        "request": options.request and options.request.read_bytes(),
        "response": options.response and options.response.read_bytes(),
    }
    if content is None:
        if any(given.values()):
            raise Bad("the proof has no salt: what was asked was erased, or is another key's")
        return []
    try:
        salt = bytes.fromhex(content["salt"])
        texts = {name: content[name] for name in given}
    except (ValueError, KeyError, TypeError):
        raise Bad("the proof's content cannot be read") from None
    shown = []
    for name, value in given.items():
        data = value or (texts[name].encode() if isinstance(texts[name], str) else None)
        if data is not None:
            if hashlib.sha256(salt + data).hexdigest() != entry.get(f"{name}_sha256"):
                raise Bad(f"the {name} is not the one that was recorded")
            shown.append(name)
    return shown


def read_text(path):
    with path.open("rb") as file:
        return file.read(MAX_NOTE_BYTES).decode()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    log = commands.add_parser("log", help="a whole log: the SQLite database, or an export of it")
    log.add_argument("--checkpoint", type=Path, help="a checkpoint kept from an earlier day")
    log.set_defaults(verify=verify_log)
    proof = commands.add_parser("proof", help="one request's proof")
    proof.add_argument("--witness", type=Path, action="append", default=[], help="its key's file")
    proof.add_argument("--request", type=Path, help="the body that was sent")
    proof.add_argument("--response", type=Path, help="what the entry's response_sha256 is of")
    proof.set_defaults(verify=verify_proof)
    for command in (log, proof):
        command.add_argument("file", type=Path)
        command.add_argument("--key", type=Path, required=True, help="file with the log's key")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main():
    options = arguments()
    try:
        found, line = options.verify(options)
    except (Bad, OSError, UnicodeDecodeError, sqlite3.Error) as error:
        if options.json:
            print(json.dumps({"verified": False, "error": str(error)}))
            sys.exit(1)
        sys.exit(f"NOT VERIFIED: {error}")
    print(json.dumps({"verified": True, **found}) if options.json else line)


if __name__ == "__main__":
    main()
