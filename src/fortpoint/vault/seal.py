"""Seal a model: read its files once, check them, encrypt them, and put them in place whole.

1. every safetensors header is checked: no shape, offset or overlap that a writer would not make;
2. a random key is wrapped first: with the key server down, nothing is written;
3. the files are read in chunks; their digests are taken while two threads encrypt and write;
4. a digest that is not the manifest's, or a full disk, ends it and leaves nothing;
5. everything is synced, and one rename makes it visible.

Memory is flat: four chunks, whatever the model's size.

Not protected here: the plain folder. It stays until it is removed, and on flash storage its
blocks may outlive that; an encrypted disk covers them.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import secrets
import stat
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from fortpoint.errors import DigestMismatch, ModelError, StorageError
from fortpoint.vault import atomic_file, layout
from fortpoint.vault.key_encryption import KEY_BYTES, KeyEncryption
from fortpoint.vault.model_folder import Manifest, read_manifest
from fortpoint.vault.seal_format import (
    CHUNK_BYTES,
    TAG_BYTES,
    ChunkCipher,
    Envelope,
    SealHeader,
)
from fortpoint.vault.sealed_folder import SEALED_FILE, KeyRecord, sealed_path
from fortpoint.vault.tensor_file import TensorFile

Progress = Callable[[int, int], None]

_THREADS = 2
_IN_FLIGHT = 4


def seal_model(
    model: Path,
    home: Path,
    kek: KeyEncryption,
    progress: Progress = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Path:
    """Seal the folder ``model`` under its manifest's name; returns the sealed folder.

    Raises ``ModelError`` when the model is not what its manifest says or is sealed already,
    ``KeyUnavailable`` without a KEK, ``StorageError`` when the disk is full.
    """
    manifest = read_manifest(model)
    target = sealed_path(home, manifest.name)
    if target.exists():
        raise ModelError(f"{manifest.name} is sealed already; remove {target.name} first")
    for name in manifest.files:
        if name.endswith(".safetensors"):
            TensorFile(model / name).check()
    key = secrets.token_bytes(KEY_BYTES)
    record = KeyRecord.wrap(key, manifest.digest, kek)
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".seal-", dir=target.parent) as scratch:
            folder = Path(scratch) / "sealed"
            folder.mkdir(mode=0o700)
            _write(model, manifest, key, folder / SEALED_FILE, progress, chunk_bytes)
            record.write(folder)
            folder.rename(target)
            atomic_file.sync(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot seal {manifest.name}: {error.strerror or error}; nothing was kept. Make "
            "room, then seal it again"
        ) from None
    return target


def _write(
    model: Path, manifest: Manifest, key: bytes, file: Path, progress: Progress, chunk_bytes: int
) -> None:
    with ExitStack() as opened:
        sources = {
            name: opened.enter_context(_open(model, name)) for name in sorted(manifest.files)
        }
        sizes = {name: os.fstat(source.fileno()).st_size for name, source in sources.items()}
        header = SealHeader.new(manifest, sizes, chunk_bytes)
        header.check()
        cipher, envelope = ChunkCipher.to_seal(header, key)
        layout.check_room(envelope.n_bytes, file.parent)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as sealed:
            sealed.write(envelope.encoded())
            sealed.flush()
            plain = _Plain(sources, header)
            _Writer(cipher, envelope, descriptor).write(plain, progress)
            plain.finish()
            os.fsync(descriptor)


def _open(model: Path, name: str) -> io.FileIO:
    if Path(name).name != name:
        raise ModelError(f"the manifest names {name[:64]!r}, which is no file of its folder")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        source = io.FileIO(os.open(model / name, flags))
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        source.close()
        raise ModelError(f"{name} is not a regular file")
    return source


class _Plain:
    """The files one after another, each digested as it passes."""

    def __init__(self, sources: dict[str, io.FileIO], header: SealHeader) -> None:
        self._digests = header.manifest.files
        self._files = iter([(file.name, file.n_bytes, sources[file.name]) for file in header.files])
        self._name, self._left, self._source = next(self._files)
        self._digest = hashlib.sha256()

    def fill(self, buffer: memoryview) -> None:
        """Raises ``ModelError`` where a file is shorter than it was, or not the manifest's."""
        while buffer:
            while self._left == 0:
                self._next()
            n = self._source.readinto(buffer[: self._left])
            if not n:
                raise ModelError(f"{self._name} changed while it was sealed")
            self._digest.update(buffer[:n])
            self._left -= n
            buffer = buffer[n:]

    def finish(self) -> None:
        """Check the last files, which may be empty."""
        while self._next():
            if self._left:
                raise ModelError(f"{self._name} changed while it was sealed")

    def _next(self) -> bool:
        if not hmac.compare_digest(self._digest.hexdigest(), self._digests[self._name]):
            raise DigestMismatch(
                f"{self._name} is not the file that was pulled; nothing was sealed. Remove the "
                "model and pull it again"
            )
        self._digest = hashlib.sha256()
        self._name, self._left, self._source = next(self._files, ("", 0, self._source))
        return bool(self._name)


class _Writer:
    """Encrypts and writes chunks in threads while the next ones are read."""

    def __init__(self, cipher: ChunkCipher, envelope: Envelope, descriptor: int) -> None:
        self._cipher = cipher
        self._envelope = envelope
        self._descriptor = descriptor
        chunk = envelope.header.chunk_bytes
        self._buffers = [
            (bytearray(chunk), bytearray(chunk + TAG_BYTES)) for _ in range(_IN_FLIGHT)
        ]

    def write(self, plain: _Plain, progress: Progress) -> None:
        header = self._envelope.header
        running: deque[Future[None]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for position in range(header.n_chunks):
                    if len(running) == _IN_FLIGHT:
                        running.popleft().result()
                        progress(position * header.chunk_bytes, header.n_bytes)
                    buffer, _ = self._buffers[position % _IN_FLIGHT]
                    plain.fill(memoryview(buffer)[: header.chunk_length(position)])
                    running.append(pool.submit(self._one, position))
                while running:
                    running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
        progress(header.n_bytes, header.n_bytes)

    def _one(self, position: int) -> None:
        n = self._envelope.header.chunk_length(position)
        plain, sealed = self._buffers[position % _IN_FLIGHT]
        out = memoryview(sealed)[: n + TAG_BYTES]
        self._cipher.encrypt_into(position, memoryview(plain)[:n], out)
        offset = self._envelope.offset(position)
        while out:
            written = os.pwrite(self._descriptor, out, offset)
            out, offset = out[written:], offset + written
