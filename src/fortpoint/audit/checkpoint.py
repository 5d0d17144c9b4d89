"""Signed tree heads in the C2SP formats tlog-checkpoint and signed-note.

    fortpoint/4be0643f1d98573b
    18
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=
    <blank>
    — fortpoint/4be0643f1d98573b Az3grlgt...

Origin, number of entries, root, and an Ed25519 signature of those three lines. Any tool that
reads the format can check one, given the verifier key (``keys/audit.pub``).

A checkpoint says what the log was, not that it is the newest: whoever holds the whole home
can put back an older copy of it. Keep a checkpoint somewhere else and verify against it.
Sources: c2sp.org/signed-note, c2sp.org/tlog-checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fortpoint.audit.merkle import HASH_BYTES
from fortpoint.errors import VerificationError

MAX_NOTE_BYTES = 16 * 1024

_ED25519 = b"\x01"  # signed-note's signature type
KEY_ID_BYTES = 4
DASH = "\N{EM DASH} "
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
KEY_ID = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was signed: the log ``origin`` has ``size`` entries under ``root_hash``."""

    origin: str
    size: int
    root_hash: bytes

    def text(self) -> str:
        root = base64.b64encode(self.root_hash).decode("ascii")
        return f"{self.origin}\n{self.size}\n{root}\n"


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A named Ed25519 public key; for a log, the name is the log's origin."""

    name: str
    public_bytes: bytes

    @property
    def key_id(self) -> bytes:
        """signed-note: SHA-256(name || 0x0A || type || key), the first four bytes."""
        named = self.name.encode() + b"\n" + _ED25519 + self.public_bytes
        return hashlib.sha256(named).digest()[:KEY_ID_BYTES]

    def __str__(self) -> str:
        key = base64.b64encode(_ED25519 + self.public_bytes).decode("ascii")
        return f"{self.name}+{self.key_id.hex()}+{key}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read ``name+key id+base64 key``. Raises ``VerificationError``."""
        name, key_id, encoded = [*text.strip().split("+", 2), "", "", ""][:3]
        key = decode_base64(encoded)
        if not is_key_name(name) or key is None or len(key) != 33 or key[:1] != _ED25519:
            raise VerificationError("this is not an Ed25519 verifier key (name+id+base64)")
        parsed = cls(name, key[1:])
        if not KEY_ID.fullmatch(key_id) or parsed.key_id.hex() != key_id:
            raise VerificationError("the verifier key's id does not match its name and key")
        return parsed

    def open(self, note: bytes) -> str:
        """The text that this key signed. Raises ``VerificationError``.

        Lines of other keys (witnesses) are ignored; one bad line of ours refuses the note.
        """
        text, signatures = split_note(note)
        ours = [line for line in signatures if line.startswith(f"{DASH}{self.name} ")]
        found = False
        for line in ours:
            data = decode_base64(line.removeprefix(f"{DASH}{self.name} "))
            if data is None or len(data) <= KEY_ID_BYTES:
                raise VerificationError("a signature line cannot be read")
            if data[:KEY_ID_BYTES] == self.key_id:
                self._verify(text, data[KEY_ID_BYTES:])
                found = True
        if not found:
            raise VerificationError("no signature by the log's key")
        return text

    def signed(self, line: str) -> bool:
        """Whether a signature line says that it is by this key."""
        prefix = f"{DASH}{self.name} "
        data = decode_base64(line.removeprefix(prefix)) if line.startswith(prefix) else None
        return data is not None and data[:KEY_ID_BYTES] == self.key_id

    def _verify(self, text: str, signature: bytes) -> None:
        try:
            Ed25519PublicKey.from_public_bytes(self.public_bytes).verify(signature, text.encode())
        except (InvalidSignature, ValueError):
            raise VerificationError("the signature does not verify") from None

    def open_checkpoint(self, note: bytes) -> Checkpoint:
        """The checkpoint in a note signed by this key. Raises ``VerificationError``."""
        checkpoint = _parse_checkpoint(self.open(note))
        if checkpoint.origin != self.name:
            raise VerificationError("the checkpoint is of another log")
        return checkpoint


class Signer:
    """The private key of a log. It never shows itself."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        if not is_key_name(name):
            raise ValueError("a key name has neither spaces nor plus signs")
        self._private_key = private_key
        self.verifier = VerifierKey(name, private_key.public_key().public_bytes_raw())

    def sign(self, text: str) -> bytes:
        """A signed note with this text, which ends in a newline and has no blank line."""
        if not text.endswith("\n") or "\n\n" in text or text.startswith("\n"):
            raise ValueError("a note's text ends in one newline and has no blank line")
        signature = self.verifier.key_id + self._private_key.sign(text.encode())
        encoded = base64.b64encode(signature).decode("ascii")
        return f"{text}\n{DASH}{self.verifier.name} {encoded}\n".encode()

    def sign_checkpoint(self, size: int, root_hash: bytes) -> bytes:
        return self.sign(Checkpoint(self.verifier.name, size, root_hash).text())


def split_note(note: bytes) -> tuple[str, list[str]]:
    """A note's text and its signature lines. Raises ``VerificationError``."""
    try:
        # The last blank line divides: signature lines hold none.
        text, blank, signatures = note[:MAX_NOTE_BYTES].decode().rpartition("\n\n")
    except UnicodeDecodeError:
        raise VerificationError("the note is not UTF-8") from None
    if len(note) > MAX_NOTE_BYTES or not blank or not signatures.endswith("\n"):
        raise VerificationError("this is not a signed note")
    return text + "\n", signatures.removesuffix("\n").split("\n")


def _parse_checkpoint(text: str) -> Checkpoint:
    # Lines after the third are extensions, which the format allows and we do not write.
    lines = text.removesuffix("\n").split("\n")
    if len(lines) < 3 or not all(lines) or not _SIZE.fullmatch(lines[1]):
        raise VerificationError("the note is not a checkpoint")
    root = decode_base64(lines[2])
    if root is None or len(root) != HASH_BYTES:
        raise VerificationError("the checkpoint's root is not a SHA-256 hash")
    return Checkpoint(lines[0], int(lines[1]), root)


def decode_base64(text: str) -> bytes | None:
    """None for what is not base64 in its one canonical spelling."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    # Only the one canonical spelling: a second one would be a changed byte that verifies.
    return data if base64.b64encode(data).decode("ascii") == text else None


def is_key_name(name: str) -> bool:
    """signed-note: not empty, neither spaces nor plus signs."""
    return bool(name) and "+" not in name and name.isprintable() and not re.search(r"\s", name)
