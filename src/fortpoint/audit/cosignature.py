"""A witness's statement that a checkpoint continues all that it saw before, as C2SP has it.

    — witness.example jWbPPwAAAABkGFDL...

is the line that a ``Cosigner`` adds to a checkpoint: key id, time and an Ed25519 signature of

    cosignature/v1
    time 1679315147
    <the checkpoint's three lines>

Who trusts a witness trusts that it ran and kept its state, not that it knows what the log's
entries say. Source: c2sp.org/tlog-cosignature (the Ed25519 type, 0x04).
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fortpoint.audit.checkpoint import (
    DASH,
    KEY_ID,
    KEY_ID_BYTES,
    decode_base64,
    is_key_name,
    split_note,
)
from fortpoint.errors import VerificationError

_COSIGNATURE = b"\x04"  # signed-note's signature type
_TIME_BYTES = 8
_LINE_BYTES = KEY_ID_BYTES + _TIME_BYTES + 64
_MAX_TIME = 2**63 - 1


@dataclass(frozen=True, slots=True)
class WitnessKey:
    """A witness's public key, under the witness's name."""

    name: str
    public_bytes: bytes

    @property
    def key_id(self) -> bytes:
        """tlog-cosignature: SHA-256(name || 0x0A || 0x04 || key), the first four bytes."""
        named = self.name.encode() + b"\n" + _COSIGNATURE + self.public_bytes
        return hashlib.sha256(named).digest()[:KEY_ID_BYTES]

    def __str__(self) -> str:
        key = base64.b64encode(_COSIGNATURE + self.public_bytes).decode("ascii")
        return f"{self.name}+{self.key_id.hex()}+{key}"

    @classmethod
    def parse(cls, text: str) -> WitnessKey:
        """Read ``name+key id+base64 key``. Raises ``VerificationError``."""
        name, key_id, encoded = [*text.strip().split("+", 2), "", "", ""][:3]
        key = decode_base64(encoded)
        if not is_key_name(name) or key is None or len(key) != 33 or key[:1] != _COSIGNATURE:
            raise VerificationError("this is not a witness's key (name+id+base64, type 4)")
        parsed = cls(name, key[1:])
        if not KEY_ID.fullmatch(key_id) or parsed.key_id.hex() != key_id:
            raise VerificationError("the witness key's id does not match its name and key")
        return parsed

    def line_of(self, note: bytes) -> str | None:
        """The witness's first line in a note, unverified; None where there is none."""
        prefix = f"{DASH}{self.name} "
        for line in split_note(note)[1]:
            data = decode_base64(line.removeprefix(prefix)) if line.startswith(prefix) else None
            if data is not None and data[:KEY_ID_BYTES] == self.key_id:
                return line
        return None

    def open(self, note: bytes) -> int:
        """When (seconds since 1970) this witness cosigned the note.

        Raises ``VerificationError`` where it did not, or its signature is wrong.
        """
        line = self.line_of(note)
        if line is None:
            raise VerificationError(f"no cosignature by the witness {self.name}")
        data = decode_base64(line.removeprefix(f"{DASH}{self.name} ")) or b""
        when = int.from_bytes(data[KEY_ID_BYTES : KEY_ID_BYTES + _TIME_BYTES], "big")
        if len(data) != _LINE_BYTES or when > _MAX_TIME:
            raise VerificationError(f"the cosignature by {self.name} cannot be read")
        signature = data[KEY_ID_BYTES + _TIME_BYTES :]
        try:
            public = Ed25519PublicKey.from_public_bytes(self.public_bytes)
            public.verify(signature, _message(when, split_note(note)[0]))
        except (InvalidSignature, ValueError):
            raise VerificationError(f"the cosignature by {self.name} does not verify") from None
        return when


class Cosigner:
    """A witness's private key. It never shows itself."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        if not is_key_name(name):
            raise ValueError("a key name has neither spaces nor plus signs")
        self._private_key = private_key
        self.key = WitnessKey(name, private_key.public_key().public_bytes_raw())

    def cosign(self, note: bytes, when: int) -> bytes:
        """``note`` with this witness's line at its end. Raises ``VerificationError``.

        Whether the note may be cosigned is for the caller to know.
        """
        text, _ = split_note(note)
        signature = self._private_key.sign(_message(when, text))
        data = self.key.key_id + when.to_bytes(_TIME_BYTES, "big") + signature
        return note + f"{DASH}{self.key.name} {base64.b64encode(data).decode('ascii')}\n".encode()


def _message(when: int, text: str) -> bytes:
    return f"cosignature/v1\ntime {when}\n{text}".encode()
