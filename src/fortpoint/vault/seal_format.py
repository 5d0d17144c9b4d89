"""One sealed model: every file that the engine reads, encrypted in chunks that know their place.

    magic "FPSEAL01" | length of the header, u32 | header, JSON | commitment, 32 bytes
    chunk 0, tag | chunk 1, tag | ... | last chunk, tag

The files follow one another in the header's order; chunks cut through them every
``chunk_bytes``. Each is AES-256-GCM under a key of this file alone (HKDF-SHA256 of the model's
key and the header's random salt), with its position and whether it is the last as nonce (STREAM,
Hoang et al. 2015), so that no nonce repeats. Its associated data is the **whole header**, its
position and the final flag: a chunk that was moved, dropped, doubled, cut off or taken from
another file does not open, nor any chunk under a header that was changed.

AES-GCM alone would open under several keys; the commitment, which HKDF derives beside the file's
key, opens under one.

Not hidden: the header, with the model's name, its files' names, sizes and digests.
"""

from __future__ import annotations

import hmac
import re
import secrets
import struct
from dataclasses import dataclass
from typing import IO

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fortpoint.errors import SealBroken
from fortpoint.vault.layout import MAX_FILES, MAX_WEIGHTS_BYTES
from fortpoint.vault.model_folder import Manifest

MAGIC = b"FPSEAL01"
CHUNK_BYTES = 4 * 1024 * 1024
TAG_BYTES = 16
MAX_HEADER_BYTES = 1024 * 1024

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 4096, 16 * 1024 * 1024
_COMMITMENT_BYTES = 32
_SALT = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_INFO = b"fortpoint seal v1"


class SealedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    n_bytes: int


class SealHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sealed. ``salt`` is random, in hexadecimal; ``files`` are in their order."""

    manifest: Manifest
    files: tuple[SealedFile, ...]
    salt: str
    chunk_bytes: int = CHUNK_BYTES
    version: int = 1

    @classmethod
    def new(
        cls, manifest: Manifest, sizes: dict[str, int], chunk_bytes: int = CHUNK_BYTES
    ) -> SealHeader:
        files = tuple(SealedFile(name, sizes[name]) for name in sorted(sizes))
        return cls(manifest, files, secrets.token_hex(32), chunk_bytes)

    def check(self) -> None:
        """Raises ``SealBroken`` for numbers and names that no sealing of ours writes."""
        names = [file.name for file in self.files]
        fine = (
            self.version == 1
            and _SALT.fullmatch(self.salt)
            and _MIN_CHUNK_BYTES <= self.chunk_bytes <= _MAX_CHUNK_BYTES
            and 0 < len(names) <= MAX_FILES
            and names == sorted(set(names))
            and set(names) == set(self.manifest.files)
            and all(_FILE_NAME.fullmatch(name) for name in names)
            and all(0 <= file.n_bytes <= MAX_WEIGHTS_BYTES for file in self.files)
            and 0 < self.n_bytes <= MAX_WEIGHTS_BYTES
        )
        if not fine:
            raise SealBroken("the sealed file's header is not one that sealing writes")

    @property
    def n_bytes(self) -> int:
        """Of all files together, before encryption."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_chunks(self) -> int:
        return -(-self.n_bytes // self.chunk_bytes)

    def chunk_length(self, position: int) -> int:
        """Bytes of a chunk's plain text."""
        return min(self.chunk_bytes, self.n_bytes - position * self.chunk_bytes)


@dataclass(frozen=True)
class Envelope:
    """A header as it stands in the file. ``start`` is where the first chunk begins."""

    header: SealHeader
    raw: bytes
    commitment: bytes

    @property
    def start(self) -> int:
        return len(MAGIC) + 4 + len(self.raw) + _COMMITMENT_BYTES

    @property
    def n_bytes(self) -> int:
        """Of the whole sealed file."""
        return self.start + self.header.n_bytes + TAG_BYTES * self.header.n_chunks

    def offset(self, position: int) -> int:
        """Where a chunk begins in the file."""
        return self.start + position * (self.header.chunk_bytes + TAG_BYTES)

    def encoded(self) -> bytes:
        """Everything before the first chunk."""
        return MAGIC + struct.pack("<I", len(self.raw)) + self.raw + self.commitment


class ChunkCipher:
    """Encrypts and decrypts the chunks of one sealed file; may be shared by threads."""

    def __init__(self, envelope: Envelope, key: bytes) -> None:
        self._envelope = envelope
        self._aead = AESGCM(key)

    @classmethod
    def to_seal(cls, header: SealHeader, model_key: bytes) -> tuple[ChunkCipher, Envelope]:
        raw = msgspec.json.encode(header)
        key, commitment = _derive(model_key, header.salt)
        envelope = Envelope(header, raw, commitment)
        return cls(envelope, key), envelope

    @classmethod
    def to_open(cls, envelope: Envelope, model_key: bytes) -> ChunkCipher:
        """Raises ``SealBroken`` where the file was sealed under another key."""
        key, commitment = _derive(model_key, envelope.header.salt)
        if not hmac.compare_digest(commitment, envelope.commitment):
            raise SealBroken("the sealed file and its key do not belong together")
        return cls(envelope, key)

    def encrypt_into(self, position: int, plain: memoryview, out: memoryview) -> None:
        """``out`` is longer than ``plain`` by the tag."""
        self._aead.encrypt_into(self._nonce(position), plain, self._context(position), out)

    def decrypt_into(self, position: int, sealed: memoryview, out: memoryview) -> None:
        """``out`` is shorter by the tag, and zero where ``SealBroken`` is raised."""
        try:
            self._aead.decrypt_into(self._nonce(position), sealed, self._context(position), out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise SealBroken(
                f"chunk {position} of the sealed file was changed, moved or cut; restore the file"
            ) from None

    def _nonce(self, position: int) -> bytes:
        return struct.pack(">Q3xB", position, self._is_last(position))

    def _context(self, position: int) -> bytes:
        return self._envelope.raw + struct.pack(">QB", position, self._is_last(position))

    def _is_last(self, position: int) -> bool:
        return position == self._envelope.header.n_chunks - 1


def read_envelope(file: IO[bytes], n_bytes: int) -> Envelope:
    """The header of a sealed file of ``n_bytes``. Raises ``SealBroken``, also for another length.

    Nothing is authenticated yet: the first chunk that opens does that.
    """
    start = file.read(len(MAGIC) + 4)
    if len(start) != len(MAGIC) + 4 or start[: len(MAGIC)] != MAGIC:
        raise SealBroken("this is no sealed model")
    (length,) = struct.unpack("<I", start[len(MAGIC) :])
    if length > MAX_HEADER_BYTES:
        raise SealBroken(f"the sealed file's header has more than {MAX_HEADER_BYTES} bytes")
    raw, commitment = file.read(length), file.read(_COMMITMENT_BYTES)
    try:
        header = msgspec.json.decode(raw, type=SealHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise SealBroken("the sealed file's header is damaged") from None
    header.check()
    envelope = Envelope(header, raw, commitment)
    if n_bytes != envelope.n_bytes:
        raise SealBroken(
            f"the sealed file has {n_bytes} bytes, and its header speaks of {envelope.n_bytes}"
        )
    return envelope


def _derive(model_key: bytes, salt: str) -> tuple[bytes, bytes]:
    """The file's key and what commits to it."""
    derive = HKDF(SHA256(), 32 + _COMMITMENT_BYTES, bytes.fromhex(salt), _INFO)
    both = derive.derive(model_key)
    return both[:32], both[32:]
