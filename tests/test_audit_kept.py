"""An auditor who kept a checkpoint sees a history that was put back or signed anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from fortpoint.audit.checkpoint import VerifierKey
from fortpoint.audit.merkle import Frontier
from fortpoint.audit.signing_key import load_or_create, load_public
from fortpoint.audit.verify import verify
from fortpoint.errors import VerificationError
from test_audit_verify import SIZE, Connected, _sql, grow, home, run_script, verified

__all__ = ["home"]  # the fixture


def _kept(home: Path, size: int) -> bytes:
    with Connected(home) as database:
        row = database.execute("SELECT note FROM audit_checkpoints WHERE size = ?", (size,))
        note: bytes = row.fetchone()[0]
    return note


def test_log_that_continues_a_kept_checkpoint_verifies(home: Path, tmp_path: Path) -> None:
    key = load_public(home)
    for size in (1, 10, SIZE):
        note = _kept(home, size)
        kept = key.open_checkpoint(note)
        assert verify(home / "fortpoint.db", key, kept=kept).entries == SIZE
        (tmp_path / "kept").write_bytes(note)
        assert run_script(home, "--checkpoint", str(tmp_path / "kept")).returncode == 0


def test_log_put_back_to_an_older_state_is_refused_by_a_kept_checkpoint(
    home: Path, tmp_path: Path
) -> None:
    key, note = load_public(home), _kept(home, SIZE)
    _sql(
        'DELETE FROM audit_entries WHERE "index" >= 11',
        "DELETE FROM audit_checkpoints WHERE size > 11",
    )(home)
    assert verified(home).entries == 11
    with pytest.raises(VerificationError, match="entry 11 is missing"):
        verify(home / "fortpoint.db", key, kept=key.open_checkpoint(note))
    (tmp_path / "kept").write_bytes(note)
    script = run_script(home, "--checkpoint", str(tmp_path / "kept"))
    assert script.returncode == 1
    assert "entry 11 is missing" in script.stderr


def test_history_signed_anew_with_the_same_key_is_refused_by_a_kept_checkpoint(
    home: Path, tmp_path: Path
) -> None:
    key, note = load_public(home), _kept(home, 10)
    signer = load_or_create(home, may_create=False)
    with Connected(home) as database:
        database.execute("DELETE FROM audit_entries")
        database.execute("DELETE FROM audit_checkpoints")
        grow(database, signer, Frontier(), 15)
    assert verified(home).entries == 15
    with pytest.raises(VerificationError, match="not the one of the checkpoint"):
        verify(home / "fortpoint.db", key, kept=key.open_checkpoint(note))
    (tmp_path / "kept").write_bytes(note)
    assert run_script(home, "--checkpoint", str(tmp_path / "kept")).returncode == 1


def test_progress_reaches_the_end(home: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(
        home / "fortpoint.db",
        load_public(home),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (SIZE, SIZE)


def test_key_of_another_log_refuses(home: Path) -> None:
    key = VerifierKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    with pytest.raises(VerificationError, match="no signature by the log's key"):
        verify(home / "fortpoint.db", key)
