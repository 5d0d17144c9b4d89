"""``fortpoint vault``: what it prints, what it records, and what it leaves on the disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fortpoint.audit.history import Recorded, recent
from fortpoint.cli import vault
from fortpoint.errors import (
    ConfigError,
    KeyUnavailable,
    LeaseRefused,
    ModelError,
    SealBroken,
)
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


def leased(*more: str) -> str:
    """A new lease of the small model for this host."""
    lease = output("lease", "issue", "small", "--holder", "Quay Labs", "--json", *more)
    return str(json.loads(lease)["id"])


def exported(home: Path, lease: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORTPOINT_VAULT__PLAIN_EXPORT", "true")
    output("open", "small", "--lease", lease, "--plain-export", str(home.parent / name))
    return home.parent / name


def test_leaked_copy_is_traced_to_its_lease_with_a_report(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output("seal", "small", "--remove-plain")
    guilty, innocent = leased(), leased()
    copy = exported(home, guilty, "copy", monkeypatch)
    report = tmp_path / "report.md"
    found = json.loads(
        output("trace", str(copy), "--model", "small", "--report", str(report), "--json")
    )
    verdicts = {finding["lease"]: finding["identified"] for finding in found["findings"]}
    assert verdicts == {guilty: True, innocent: False}
    assert f"lease `{guilty}`, given to **Quay Labs**" in report.read_text()
    surfaces = [entry.entry.surface for entry in recorded(home)]
    assert surfaces.count("cli vault lease issue") == 2
    assert {"cli vault open", "cli vault export", "cli vault trace"} <= set(surfaces)
    table = output("trace", str(copy / "model.safetensors"), "--model", "small")
    assert "IDENTIFIED" in table


def test_commitment_is_in_the_log_before_any_release(home: Path) -> None:
    output("seal", "small")
    lease = json.loads(output("lease", "issue", "small", "--holder", "Quay Labs", "--json"))
    entry = next(e.entry for e in recorded(home) if e.entry.surface == "cli vault lease issue")
    assert lease["commitment"] in (entry.detail or "")


def test_export_is_refused_unless_configured_and_on_a_lease(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output("seal", "small")
    lease = leased()
    target = ("--plain-export", str(home.parent / "copy"))
    assert isinstance(run("open", "small", "--lease", lease, *target).exception, ConfigError)
    monkeypatch.setenv("FORTPOINT_VAULT__PLAIN_EXPORT", "true")
    assert isinstance(run("open", "small", *target).exception, ConfigError)
    assert not (home.parent / "copy").exists()


@pytest.mark.parametrize("why", ["revoked", "another host", "unknown"])
def test_release_that_is_refused_is_recorded_with_its_reason(home: Path, why: str) -> None:
    output("seal", "small")
    lease = leased(*(("--host", "elsewhere") if why == "another host" else ()))
    if why == "revoked":
        output("lease", "revoke", lease)
    wanted = "lease_" + "0" * 24 if why == "unknown" else lease
    assert isinstance(run("open", "small", "--lease", wanted).exception, LeaseRefused)
    refusal = next(e.entry for e in recorded(home) if e.entry.surface == "cli vault open")
    assert "refused" in (refusal.detail or "")
    states = json.loads(output("lease", "list", "--json"))
    assert [state["releases"] for state in states] == [0]


def test_release_is_counted_and_listed(home: Path) -> None:
    output("seal", "small")
    lease = leased()
    output("open", "small", "--lease", lease)
    assert json.loads(output("lease", "list", "--json"))[0]["releases"] == 1
    assert "Quay" in output("lease", "list")


def test_trace_of_a_stranger_names_nobody(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output("seal", "small")
    leased()
    other = model_folder(tmp_path / "other", "small", seed=9)
    found = json.loads(output("trace", str(other), "--model", "small", "--json"))
    assert [finding["identified"] for finding in found["findings"]] == [False]


def test_trace_counts_no_lease_whose_key_was_not_committed(home: Path) -> None:
    output("seal", "small")
    leased()
    path = home / "vault" / "leases.json"
    leases = json.loads(path.read_text())
    leases["leases"][0]["commitment"] = "00" * 32
    path.write_text(json.dumps(leases))
    result = run("trace", str(home / "models" / "small"), "--model", "small")
    assert isinstance(result.exception, ModelError)
    assert "no leases" in str(result.exception)
