"""A lease exists only once it is committed, and is good for one model, host, time and engine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fortpoint.errors import AuditUnavailable, LeaseRefused, SealBroken, StorageError
from fortpoint.vault import mark_master
from fortpoint.vault.leases import (
    FileLeases,
    Lease,
    Terms,
    check,
    commitment,
    is_committed,
    issue,
    mark_key,
)
from sealing import KEK, FakeTransit
from test_vault_key_encryption import transit

MASTER = bytes(range(32))
TERMS = Terms("small", "sha256:aa", "Quay Labs", "host-1", 1000, 2000)


class Log:
    """Commitments in memory; ``down`` refuses them."""

    def __init__(self) -> None:
        self.committed: list[Lease] = []
        self.down = False

    def commit(self, lease: Lease) -> None:
        if self.down:
            raise AuditUnavailable("the record could not be written")
        self.committed.append(lease)


def test_lease_is_committed_before_it_is_kept(tmp_path: Path) -> None:
    store, log = FileLeases(tmp_path), Log()
    log.down = True
    with pytest.raises(AuditUnavailable):
        issue(store, log, MASTER, TERMS)
    assert store.all() == ()
    log.down = False
    lease = issue(store, log, MASTER, TERMS)
    assert log.committed == [lease]
    assert FileLeases(tmp_path).all() == (lease,)


def test_commitment_is_of_this_key_and_lease_alone(tmp_path: Path) -> None:
    lease = issue(FileLeases(tmp_path), Log(), MASTER, TERMS)
    key = mark_key(MASTER, TERMS.digest, lease.id)
    assert is_committed(lease, key)
    assert not is_committed(lease, mark_key(bytes(32), TERMS.digest, lease.id))
    assert not is_committed(lease, mark_key(MASTER, "sha256:bb", lease.id))
    assert commitment(key, "another") != lease.commitment


def test_file_of_leases_holds_no_key(tmp_path: Path) -> None:
    lease = issue(FileLeases(tmp_path), Log(), MASTER, TERMS)
    text = (tmp_path / "vault" / "leases.json").read_bytes()
    for secret in (MASTER, mark_key(MASTER, TERMS.digest, lease.id)):
        assert secret not in text
        assert secret.hex().encode() not in text


@pytest.mark.parametrize(
    ("digest", "host", "now", "reason"),
    [
        ("sha256:bb", "host-1", 1500, "another model"),
        ("sha256:aa", "host-2", 1500, "for the host 'host-1'"),
        ("sha256:aa", "host-1", 999, "not valid at this time"),
        ("sha256:aa", "host-1", 2000, "not valid at this time"),
    ],
)
def test_lease_for_something_else_is_refused(
    tmp_path: Path, digest: str, host: str, now: int, reason: str
) -> None:
    lease = issue(FileLeases(tmp_path), Log(), MASTER, TERMS)
    check(lease, "sha256:aa", "host-1", 1000)
    with pytest.raises(LeaseRefused, match=reason):
        check(lease, digest, host, now)


def test_lease_that_was_revoked_is_refused(tmp_path: Path) -> None:
    store = FileLeases(tmp_path)
    lease = issue(store, Log(), MASTER, TERMS)
    store.update(msgspec.structs.replace(lease, revoked_at=1200))
    with pytest.raises(LeaseRefused, match="was revoked"):
        check(store.get(lease.id), "sha256:aa", "host-1", 1500)


def test_two_engines_on_one_lease_the_second_is_refused(tmp_path: Path) -> None:
    store = FileLeases(tmp_path)
    lease = issue(store, Log(), MASTER, TERMS)
    with (
        store.hold(lease.id),
        pytest.raises(LeaseRefused, match="another process uses"),
        FileLeases(tmp_path).hold(lease.id),
    ):
        pass
    with store.hold(lease.id):
        pass


@pytest.mark.parametrize("lease_id", ["", "../x", "lease_zz", "lease_" + "a" * 25])
def test_hold_of_what_is_no_lease_makes_no_file(tmp_path: Path, lease_id: str) -> None:
    with pytest.raises(LeaseRefused), FileLeases(tmp_path).hold(lease_id):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [b"", b"[]", b'{"leases":[{}]}', b"\xff", b"[" * 50_000])
def test_file_that_is_damaged_is_refused_and_kept(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "vault" / "leases.json"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(StorageError, match="is damaged"):
        issue(FileLeases(tmp_path), Log(), MASTER, TERMS)
    assert path.read_bytes() == text


def test_lease_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LeaseRefused, match="there is no lease"):
        FileLeases(tmp_path).get("lease_000000000000000000000000")


def test_master_is_made_once_and_outlives_rotation(tmp_path: Path) -> None:
    first = mark_master.load_or_create(tmp_path, KEK)
    assert mark_master.load_or_create(tmp_path, KEK) == first
    other = transit(FakeTransit())
    mark_master.rotate(tmp_path, KEK, other)
    assert mark_master.load(tmp_path, other) == first
    with pytest.raises(SealBroken):
        mark_master.load(tmp_path, KEK)


def test_master_that_was_lost_is_not_made_anew_under_leases(tmp_path: Path) -> None:
    mark_master.load_or_create(tmp_path, KEK)
    issue(FileLeases(tmp_path), Log(), MASTER, TERMS)
    mark_master.master_path(tmp_path).unlink()
    with pytest.raises(StorageError, match="no secret of marks"):
        mark_master.load_or_create(tmp_path, KEK)
