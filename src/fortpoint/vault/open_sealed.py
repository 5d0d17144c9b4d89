"""Open a sealed model into memory, and nowhere else.

    with SealedModel.open(sealed_path(home, "smollm2-135m"), kek) as model:
        config = model.read_file("config.json")
        weights = SealedCheckpoint(model)
        weights.get("model.norm.weight", (576,))  # float32, as a checkpoint on disk gives it

``SealedCheckpoint`` reads what ``engine/checkpoint.py`` reads, chunk by chunk: nothing is written,
and memory holds one tensor and a chunk beside what the caller keeps. Every byte that is returned
has been authenticated.

Not protected here: the memory of the process that opened it, and its swap.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError, SealBroken
from fortpoint.vault.key_encryption import KeyEncryption
from fortpoint.vault.layout import MAX_TEXT_BYTES
from fortpoint.vault.model_folder import Manifest
from fortpoint.vault.seal_format import TAG_BYTES, ChunkCipher, Envelope, read_envelope
from fortpoint.vault.sealed_folder import SEALED_FILE, KeyRecord
from fortpoint.vault.tensor_file import TensorFile
from fortpoint.vault.tensor_files import TensorFiles, weight_files

Bytes = NDArray[np.uint8]

_THREADS = 2


class SealedModel:
    """Use ``open``. Reads are safe from several threads."""

    def __init__(self, descriptor: int, envelope: Envelope, cipher: ChunkCipher) -> None:
        self._descriptor = descriptor
        self._envelope = envelope
        self._cipher = cipher
        self._pool = ThreadPoolExecutor(_THREADS)
        starts, start = {}, 0
        for file in envelope.header.files:
            starts[file.name] = (start, file.n_bytes)
            start += file.n_bytes
        self._files = starts

    @classmethod
    def open(cls, folder: Path, kek: KeyEncryption) -> SealedModel:
        """Raises ``ModelError``, ``SealBroken`` or ``KeyUnavailable``."""
        record = KeyRecord.read(folder)
        try:
            descriptor = os.open(folder / SEALED_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise ModelError(f"{SEALED_FILE} cannot be read: {error.strerror}") from None
        try:
            with open(descriptor, "rb", closefd=False) as file:
                envelope = read_envelope(file, os.fstat(descriptor).st_size)
            manifest = envelope.header.manifest
            if manifest.name != folder.name or manifest.digest != record.model:
                raise SealBroken("the sealed file is another model's than its folder and key say")
            cipher = ChunkCipher.to_open(envelope, record.unwrap(kek))
            return cls(descriptor, envelope, cipher)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def manifest(self) -> Manifest:
        return self._envelope.header.manifest

    @property
    def n_bytes(self) -> int:
        """Of all its files, in plain."""
        return self._envelope.header.n_bytes

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises ``ModelError`` where there is none of this name."""
        return self._place(name)[1]

    def read_file(self, name: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """A small file, such as ``config.json``."""
        if self.size(name) > max_bytes:
            raise ModelError(f"{name} is larger than {max_bytes} bytes")
        return self.read(name, 0, self.size(name)).tobytes()

    def read(self, name: str, start: int, n_bytes: int) -> Bytes:
        """Bytes of a file from ``start``, fewer where it ends. Raises ``SealBroken``."""
        begin, size = self._place(name)
        n_bytes = max(0, min(n_bytes, size - start))
        out = np.empty(n_bytes, np.uint8)
        if n_bytes:
            self._read_into(begin + start, out.data)
        return out

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Authenticate every chunk. Raises ``SealBroken`` naming one that is not as sealed."""
        header = self._envelope.header
        chunks = self._pool.map(self._check, range(header.n_chunks))
        for position, _ in enumerate(chunks):
            progress(position * header.chunk_bytes, header.n_bytes)
        progress(header.n_bytes, header.n_bytes)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _place(self, name: str) -> tuple[int, int]:
        if name not in self._files:
            raise ModelError(f"the sealed model has no {name[:64]!r}")
        return self._files[name]

    def _read_into(self, start: int, out: memoryview) -> None:
        """Whole chunks are decrypted where they belong, the two at the ends beside."""
        size = self._envelope.header.chunk_bytes
        first, last = start // size, (start + len(out) - 1) // size
        parts = []
        for position in range(first, last + 1):
            a = max(start, position * size)
            b = min(start + len(out), (position + 1) * size)
            parts.append((position, a - position * size, out[a - start : b - start]))
        if len(parts) == 1:
            self._part(*parts[0])
        else:
            list(self._pool.map(lambda part: self._part(*part), parts))

    def _part(self, position: int, offset: int, out: memoryview) -> None:
        n = self._envelope.header.chunk_length(position)
        if len(out) == n:
            self._open(position, out)
            return
        chunk = memoryview(bytearray(n))
        self._open(position, chunk)
        out[:] = chunk[offset : offset + len(out)]

    def _check(self, position: int) -> None:
        self._open(position, memoryview(bytearray(self._envelope.header.chunk_length(position))))

    def _open(self, position: int, out: memoryview) -> None:
        sealed = bytearray(len(out) + TAG_BYTES)
        try:
            n = os.preadv(self._descriptor, [sealed], self._envelope.offset(position))
        except OSError as error:
            raise ModelError(f"{SEALED_FILE} cannot be read: {error.strerror}") from None
        if n != len(sealed):
            raise SealBroken(f"the sealed file ends in its chunk {position}; restore it")
        self._cipher.decrypt_into(position, memoryview(sealed), out)


class _Source:
    """A file of a sealed model as ``TensorFile`` reads it."""

    def __init__(self, model: SealedModel, name: str) -> None:
        self.name = name
        self._model = model

    def n_bytes(self) -> int:
        return self._model.size(self.name)

    def read(self, start: int, n_bytes: int) -> Bytes:
        return self._model.read(self.name, start, n_bytes)


class SealedCheckpoint(TensorFiles):
    """Tensors of an open model by name, as ``engine/checkpoint.py`` gives them."""

    def __init__(self, model: SealedModel) -> None:
        files = weight_files(model.names, model.read_file)
        super().__init__([TensorFile(_Source(model, name)) for name in files])
