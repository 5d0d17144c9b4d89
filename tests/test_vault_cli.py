"""``fortpoint vault``: what it prints, what it records, and what it leaves on the disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fortpoint.audit.history import Recorded, recent
from fortpoint.cli import vault
from fortpoint.errors import ConfigError, KeyUnavailable, ModelError, SealBroken
from fortpoint.store.database import Database
from fortpoint.vault.sealed_folder import SEALED_FILE
from sealing import model_folder, passphrase


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model in plain and a passphrase to seal it with."""
    folder = tmp_path / "home"
    model_folder(folder)
    passphrase(tmp_path)
    monkeypatch.setenv("FORTPOINT_HOME", str(folder))
    use(monkeypatch, tmp_path / "passphrase-correct")
    return folder


def use(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("FORTPOINT_VAULT__KEY", f"passphrase-file:{file}")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(vault.app, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def recorded(home: Path) -> tuple[Recorded, ...]:
    async def ask() -> tuple[Recorded, ...]:
        database = Database.in_home(home / "state")
        try:
            return await recent(database, 100)
        finally:
            await database.close()

    return asyncio.run(ask())


def test_seal_keeps_the_plain_files_until_told_and_says_so(home: Path) -> None:
    assert "still here" in output("seal", "small")
    assert (home / "models" / "small" / "model.safetensors").exists()


def test_sealed_and_removed_model_opens_and_leaves_nothing_plain(home: Path) -> None:
    plain = (home / "models" / "small" / "model.safetensors").read_bytes()
    digest = json.loads(output("seal", "small", "--remove-plain", "--json"))["digest"]
    opened = json.loads(output("open", "small", "--json"))
    assert opened["digest"] == digest
    assert "model.safetensors" in opened["files"]
    assert not (home / "models" / "small").exists()
    runs = [plain[i : i + 32] for i in range(512, len(plain) - 32, 512)]
    for file in (file for file in home.rglob("*") if file.is_file()):
        assert not any(run in file.read_bytes() for run in runs), file


def test_every_act_is_recorded_with_the_models_digest(home: Path) -> None:
    digest = json.loads(output("seal", "small", "--json"))["digest"]
    output("open", "small")
    acts = [(entry.entry.surface, entry.entry.model_digest) for entry in recorded(home)]
    assert set(acts) == {("cli vault seal", digest), ("cli vault open", digest)}


def test_rotate_opens_with_the_new_passphrase_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output("seal", "small")
    passphrase(tmp_path, "another passphrase")
    use(monkeypatch, tmp_path / "passphrase-another")
    with pytest.raises(SealBroken):
        CliRunner().invoke(vault.app, ["open", "small"], catch_exceptions=False)
    output("rotate", "small", "--from", f"passphrase-file:{tmp_path}/passphrase-correct")
    output("open", "small")


def test_changed_byte_is_refused_and_not_recorded_as_opened(home: Path) -> None:
    output("seal", "small")
    file = home / "sealed" / "small" / SEALED_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert isinstance(run("open", "small").exception, SealBroken)
    assert [entry.entry.surface for entry in recorded(home)] == ["cli vault seal"]


def test_without_a_key_nothing_is_sealed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTPOINT_VAULT__KEY", "")
    assert isinstance(run("seal", "small").exception, ConfigError)
    use(monkeypatch, home / "none")
    assert isinstance(run("seal", "small").exception, KeyUnavailable)
    assert list((home / "models" / "small").glob("*.safetensors"))


def test_list_names_what_is_sealed(home: Path) -> None:
    assert "nothing is sealed" in output("list")
    output("seal", "small")
    assert [model["name"] for model in json.loads(output("list", "--json"))] == ["small"]


@pytest.mark.parametrize("command", ["seal", "open"])
def test_name_that_is_none_is_refused(home: Path, command: str) -> None:
    for name in ("absent", "../small"):
        assert isinstance(run(command, name).exception, ModelError)
