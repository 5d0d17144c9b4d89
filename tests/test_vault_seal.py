"""A sealed model opens as it was sealed, or not at all, and sealing leaves nothing half-made."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fortpoint.errors import DigestMismatch, KeyUnavailable, ModelError, SealBroken, StorageError
from fortpoint.vault import seal as sealing_module
from fortpoint.vault.model_folder import open_model, write_manifest
from fortpoint.vault.open_sealed import SealedCheckpoint, SealedModel
from fortpoint.vault.seal import seal_model
from fortpoint.vault.seal_format import MAGIC, TAG_BYTES, Envelope, read_envelope
from fortpoint.vault.sealed_folder import (
    KEY_FILE,
    SEALED_FILE,
    KeyRecord,
    list_sealed,
    rotate,
    sealed_path,
)
from fortpoint.vault.tensor_file import TensorFile
from sealing import CHUNK, KEK, FakeTransit, model_folder, passphrase
from test_vault_key_encryption import transit

SEALED_CHUNK = CHUNK + TAG_BYTES


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """The sealed folder of the small model."""
    return seal_model(model_folder(tmp_path), tmp_path, KEK, chunk_bytes=CHUNK)


def envelope(sealed: Path) -> Envelope:
    with (sealed / SEALED_FILE).open("rb") as file:
        return read_envelope(file, (sealed / SEALED_FILE).stat().st_size)


def verify(sealed: Path) -> None:
    with SealedModel.open(sealed, KEK) as model:
        model.verify()


def edit(sealed: Path, change: Callable[[bytearray, int], bytes | bytearray]) -> None:
    """``change`` gets the file's bytes and where the first chunk begins."""
    file = sealed / SEALED_FILE
    start = envelope(sealed).start
    file.write_bytes(change(bytearray(file.read_bytes()), start))


def chunk(data: bytes | bytearray, start: int, position: int) -> bytes:
    return bytes(data[start + position * SEALED_CHUNK : start + (position + 1) * SEALED_CHUNK])


def put(data: bytearray, start: int, position: int, part: bytes) -> bytearray:
    data[start + position * SEALED_CHUNK : start + (position + 1) * SEALED_CHUNK] = part
    return data


def test_sealed_files_open_as_they_were(tmp_path: Path, sealed: Path) -> None:
    plain = open_model(tmp_path / "models" / "small")
    with SealedModel.open(sealed, KEK) as model:
        assert model.manifest == plain.manifest
        for name in plain.manifest.files:
            assert model.read_file(name) == (plain.path / name).read_bytes()
        model.verify()


def test_sealed_file_holds_no_run_of_the_plain_bytes(tmp_path: Path, sealed: Path) -> None:
    everything = b"".join(file.read_bytes() for file in sealed.iterdir())
    for name in ("model.safetensors", "tokenizer.json"):
        plain = (tmp_path / "models" / "small" / name).read_bytes()
        runs = {plain[i : i + 16] for i in range(0, len(plain) - 16, 16)}
        assert not any(run in everything for run in runs)


@pytest.mark.parametrize(("start", "n"), [(0, 1), (4000, 200), (5, 20_000), (4096, 8192)])
def test_bytes_across_chunks_are_the_files(
    tmp_path: Path, sealed: Path, start: int, n: int
) -> None:
    plain = (tmp_path / "models" / "small" / "model.safetensors").read_bytes()
    with SealedModel.open(sealed, KEK) as model:
        assert model.read("model.safetensors", start, n).tobytes() == plain[start : start + n]
        assert model.read("model.safetensors", len(plain), 10).size == 0


def test_sealed_tensors_equal_those_on_disk(tmp_path: Path, sealed: Path) -> None:
    file = TensorFile(tmp_path / "models" / "small" / "model.safetensors")
    with SealedModel.open(sealed, KEK) as model:
        weights = SealedCheckpoint(model)
        assert sorted(weights.names) == sorted(file.names)
        for name in file.names:
            np.testing.assert_array_equal(weights.get(name), file.get(name, file.shape(name)))
        with pytest.raises(ModelError, match="has the shape 48x64, not 64x48"):
            weights.get("model.layers.0.mlp.up_proj.weight", (64, 48))
        with pytest.raises(ModelError, match="lack nothing"):
            weights.get("nothing")


def test_every_flipped_byte_of_the_file_is_found(sealed: Path) -> None:
    original = (sealed / SEALED_FILE).read_bytes()
    start = envelope(sealed).start
    places = [*range(0, start, 5), *range(start, len(original), 509), len(original) - 1]
    for place in places:
        changed = bytearray(original)
        changed[place] ^= 0x01
        (sealed / SEALED_FILE).write_bytes(changed)
        with pytest.raises(ModelError):
            verify(sealed)


def test_chunks_in_another_order_are_found(sealed: Path) -> None:
    def swap(data: bytearray, start: int) -> bytearray:
        first, second = chunk(data, start, 1), chunk(data, start, 2)
        return put(put(data, start, 1, second), start, 2, first)

    edit(sealed, swap)
    with pytest.raises(SealBroken, match="chunk 1 "):
        verify(sealed)


def test_chunk_in_place_of_another_is_found(sealed: Path) -> None:
    edit(sealed, lambda data, start: put(data, start, 3, chunk(data, start, 2)))
    with pytest.raises(SealBroken, match="chunk 3 "):
        verify(sealed)


@pytest.mark.parametrize("n", [1, TAG_BYTES, SEALED_CHUNK, 3 * SEALED_CHUNK])
def test_file_cut_short_or_lengthened_is_refused_at_once(sealed: Path, n: int) -> None:
    edit(sealed, lambda data, start: data[:-n])
    with pytest.raises(SealBroken, match="bytes, and its header speaks of"):
        envelope(sealed)
    with (sealed / SEALED_FILE).open("ab") as file:
        file.write(bytes(2 * n))
    with pytest.raises(SealBroken, match="bytes, and its header speaks of"):
        verify(sealed)


def test_chunk_of_another_sealing_of_the_same_model_is_found(tmp_path: Path, sealed: Path) -> None:
    other = tmp_path / "other"
    model_folder(other)
    twin = seal_model(other / "models" / "small", other, KEK, chunk_bytes=CHUNK)
    theirs = (twin / SEALED_FILE).read_bytes()
    at = envelope(twin).start
    edit(sealed, lambda data, start: put(data, start, 2, chunk(theirs, at, 2)))
    with pytest.raises(SealBroken, match="chunk 2 "):
        verify(sealed)


def test_sealed_file_under_another_sealings_key_is_refused(tmp_path: Path, sealed: Path) -> None:
    other = tmp_path / "other"
    model_folder(other)
    twin = seal_model(other / "models" / "small", other, KEK, chunk_bytes=CHUNK)
    (sealed / KEY_FILE).write_bytes((twin / KEY_FILE).read_bytes())
    with pytest.raises(SealBroken, match="do not belong together"):
        verify(sealed)


def test_sealed_model_under_another_name_is_refused(tmp_path: Path, sealed: Path) -> None:
    renamed = sealed.rename(sealed.with_name("other"))
    with pytest.raises(SealBroken, match="another model's"):
        SealedModel.open(renamed, KEK)


def test_header_with_a_shorter_file_and_fitting_length_opens_nothing(sealed: Path) -> None:
    def cut(data: bytearray, start: int) -> bytes:
        whole = envelope(sealed)
        files = tuple(
            msgspec.structs.replace(file, n_bytes=file.n_bytes - CHUNK)
            if file.name == "model.safetensors"
            else file
            for file in whole.header.files
        )
        header = msgspec.structs.replace(whole.header, files=files)
        shorter = Envelope(header, msgspec.json.encode(header), whole.commitment)
        return shorter.encoded() + bytes(data[start:-SEALED_CHUNK])

    edit(sealed, cut)
    with pytest.raises(SealBroken, match=r"chunk 0 "):
        verify(sealed)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1 << 40},
        {"salt": "zz" * 32},
        {"salt": ""},
        {"files": ()},
        {"files": "reversed"},
        {"files": "negative"},
        {"files": "path"},
        {"files": "huge"},
    ],
)
def test_header_that_sealing_never_writes_is_refused(sealed: Path, changes: dict) -> None:
    header = envelope(sealed).header
    first, *rest = header.files
    bad_files = {
        "reversed": header.files[::-1],
        "negative": (msgspec.structs.replace(first, n_bytes=-1), *rest),
        "path": (msgspec.structs.replace(first, name="../x"), *rest),
        "huge": (msgspec.structs.replace(first, n_bytes=1 << 62), *rest),
    }
    if isinstance(changes.get("files"), str):
        changes = {"files": bad_files[changes["files"]]}
    with pytest.raises(SealBroken, match="not one that sealing writes"):
        msgspec.structs.replace(header, **changes).check()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"PK\x03\x04" + bytes(60),
        MAGIC + struct.pack("<I", 1 << 31),
        MAGIC + struct.pack("<I", 4) + b"[[[[" + bytes(32),
        MAGIC + struct.pack("<I", 100_000) + b"[" * 100_000 + bytes(32),
        MAGIC + struct.pack("<I", 2) + b"{}" + bytes(32),
    ],
)
def test_file_that_is_no_sealed_model_is_refused(sealed: Path, data: bytes) -> None:
    (sealed / SEALED_FILE).write_bytes(data)
    with pytest.raises(SealBroken):
        verify(sealed)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model":"x"}', b"\xff", b"[" * 60_000])
def test_key_file_that_is_damaged_is_refused(sealed: Path, text: bytes) -> None:
    (sealed / KEY_FILE).write_bytes(text)
    with pytest.raises(SealBroken, match="is damaged"):
        verify(sealed)


def test_wrong_passphrase_opens_nothing(tmp_path: Path, sealed: Path) -> None:
    rotate(sealed, KEK, passphrase(tmp_path))
    with pytest.raises(SealBroken, match="another passphrase"):
        SealedModel.open(sealed, passphrase(tmp_path, "another passphrase"))


def test_failed_open_leaves_no_file_open(tmp_path: Path, sealed: Path) -> None:
    wrong = transit(FakeTransit())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(SealBroken):
            SealedModel.open(sealed, wrong)
    assert len(os.listdir("/proc/self/fd")) == before


def test_key_server_down_seals_nothing(tmp_path: Path) -> None:
    server = FakeTransit()
    server.down = True
    with pytest.raises(KeyUnavailable):
        seal_model(model_folder(tmp_path), tmp_path, transit(server))
    assert not (tmp_path / "sealed").exists()


def test_disk_that_fills_while_sealing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def full(descriptor: int, data: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(sealing_module.os, "pwrite", full)
    with pytest.raises(StorageError, match=r"No space left on device; nothing was kept"):
        seal_model(model_folder(tmp_path), tmp_path, KEK, chunk_bytes=CHUNK)
    assert list((tmp_path / "sealed").iterdir()) == []


def test_model_that_is_not_its_manifests_is_not_sealed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "tokenizer.json").write_text("[]" * 1000)
    with pytest.raises(DigestMismatch, match=r"tokenizer\.json is not the file that was pulled"):
        seal_model(folder, tmp_path, KEK, chunk_bytes=CHUNK)
    assert list((tmp_path / "sealed").iterdir()) == []


def test_model_with_a_link_is_not_sealed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        seal_model(folder, tmp_path, KEK)


def test_manifest_that_names_another_folder_is_not_sealed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    text = (folder / "manifest.json").read_text().replace("merges.txt", "../merges.txt")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match="no file of its folder"):
        seal_model(folder, tmp_path, KEK)


def test_model_that_is_sealed_already_stays(tmp_path: Path, sealed: Path) -> None:
    before = (sealed / SEALED_FILE).read_bytes()
    with pytest.raises(ModelError, match="is sealed already"):
        seal_model(tmp_path / "models" / "small", tmp_path, KEK)
    assert (sealed / SEALED_FILE).read_bytes() == before


_TWO = {"a": ("F32", [2, 2], [0, 16]), "b": ("F32", [2], [16, 24])}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("F32", [2], [8, 16]), "overlaps, or leaves a gap"),
        (("F32", [2], [20, 28]), "overlaps, or leaves a gap"),
        (("F32", [3], [16, 24]), "another number of bytes"),
        (("F32", [-2], [16, 24]), "a shape that is none"),
        (("F32", [-1, -2], [16, 24]), "a shape that is none"),
        (("F32", [1 << 62, 1 << 62], [16, 24]), "another number of bytes"),
        (("F32", [1] * 5000, [16, 24]), "a shape that is none"),
        (("STR", [2], [16, 24]), "a shape that is none"),
        (("F32", [1], [16, 20]), "does not end where its last tensor does"),
    ],
)
def test_tensors_that_lie_as_no_writer_lays_them_are_not_sealed(
    tmp_path: Path, entry: tuple, reason: str
) -> None:
    folder = model_folder(tmp_path)
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in {**_TWO, "b": entry}.items()
    }
    raw = msgspec.json.encode(entries)
    data = struct.pack("<Q", len(raw)) + raw + bytes(24)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "manifest.json").unlink()
    write_manifest(folder, "small", "x", "x", 0)
    with pytest.raises(ModelError, match=reason):
        seal_model(folder, tmp_path, KEK)


def test_header_of_too_many_tensors_is_refused_by_its_length(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**9 * 60) + b"{" * 100)
    with pytest.raises(ModelError, match="a header of more than"):
        seal_model(folder, tmp_path, KEK)


def test_rotation_changes_the_wrapped_key_and_no_byte_of_the_weights(
    tmp_path: Path, sealed: Path
) -> None:
    old, new = KEK, transit(FakeTransit())
    before = (sealed / SEALED_FILE).read_bytes()
    rotate(sealed, old, new)
    assert (sealed / SEALED_FILE).read_bytes() == before
    with SealedModel.open(sealed, new) as model:
        model.verify()
    with pytest.raises(SealBroken):
        SealedModel.open(sealed, old)


def test_rotation_to_a_kek_that_is_down_leaves_the_old_one(tmp_path: Path, sealed: Path) -> None:
    server = FakeTransit()
    server.down = True
    with pytest.raises(KeyUnavailable):
        rotate(sealed, KEK, transit(server))
    verify(sealed)
    assert sorted(file.name for file in sealed.iterdir()) == [KEY_FILE, SEALED_FILE]


def test_sealed_folder_is_its_owners_alone(sealed: Path) -> None:
    assert sealed.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in sealed.iterdir())


def test_list_names_what_is_sealed(tmp_path: Path, sealed: Path) -> None:
    model_folder(tmp_path, "second", seed=1)
    seal_model(tmp_path / "models" / "second", tmp_path, KEK)
    assert [manifest.name for manifest in list_sealed(tmp_path)] == ["second", "small"]


def test_model_that_is_not_sealed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'none' is not sealed here"):
        KeyRecord.read(sealed_path(tmp_path, "none"))


def test_sealing_takes_no_more_memory_for_a_larger_model(tmp_path: Path) -> None:
    def peak(name: str, n_bytes: int) -> int:
        folder = model_folder(tmp_path, name)
        (folder / "vocab.txt").write_bytes(bytes(n_bytes))
        (folder / "manifest.json").unlink()
        write_manifest(folder, name, "x", "x", 0)
        kek = KEK
        tracemalloc.start()
        seal_model(folder, tmp_path, kek, chunk_bytes=1 << 16)
        with SealedModel.open(sealed_path(tmp_path, name), kek) as model:
            model.verify()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak("a", 1 << 20), peak("b", 24 << 20)
    assert large < small + (1 << 20)
