"""Proofs over HTTP: what is handed out holds, what is asked wrongly is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, text

from audit_world import CUSTOMER, OPERATOR, STRANGER, World, cosigner, entry, world
from fortpoint.audit.merkle import leaf_hash
from fortpoint.audit.proofs import check_consistency, inclusion_root
from fortpoint.errors import VerificationError
from fortpoint.store.tables import audit_entries

CHECKPOINT = "/api/audit/checkpoint"
INCLUSION = "/api/audit/proof/inclusion"
CONSISTENCY = "/api/audit/proof/consistency"
COSIGNATURE = "/api/audit/cosignature"
ENTRIES = "/api/audit/entries"


@pytest.fixture
async def made(tmp_path: Path, database_address: str) -> AsyncIterator[World]:
    async with world(tmp_path / "home", database_address) as made:
        yield made


async def count(made: World) -> int:
    query = select(func.count()).select_from(audit_entries)
    return await made.database.read(lambda connection: connection.execute(query).scalar_one())


def hashes(path: list[str]) -> list[bytes]:
    return [bytes.fromhex(one) for one in path]


# ---- abuse ----


@pytest.mark.parametrize(
    "path",
    [CHECKPOINT, INCLUSION, CONSISTENCY, ENTRIES, "/api/audit/requests/req_" + "0" * 24],
)
async def test_caller_without_a_key_is_refused_and_recorded(made: World, path: str) -> None:
    async with made.client("sk-fp-nobody") as client:
        assert (await client.get(path)).status_code == 401
    assert await count(made) == 1


@pytest.mark.parametrize(
    "query",
    [
        "?leaf=5&size=5",
        "?leaf=5",
        "?leaf=0&size=6",
        "?leaf=-1",
        "?leaf=x",
        "?leaf=1&leaf=2",
        "?leaf=99999999999999999999",
        "?leaf=0&size=1%27%20OR%201=1",
        "?other=1",
    ],
)
async def test_inclusion_asked_wrongly_is_400(made: World, query: str) -> None:
    await made.fill(5)
    async with made.client() as client:
        answer = await client.get(INCLUSION + query)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("query", ["?from=4&to=3", "?from=6", "?from=2&to=6", "?from=a", "?old=1"])
async def test_consistency_asked_wrongly_is_400(made: World, query: str) -> None:
    await made.fill(5)
    async with made.client() as client:
        assert (await client.get(CONSISTENCY + query)).status_code == 400


async def test_empty_log_has_no_checkpoint_and_no_proof(made: World) -> None:
    async with made.client() as client:
        for path in (CHECKPOINT, INCLUSION, CONSISTENCY):
            assert (await client.get(path)).status_code == 404


async def test_entries_are_not_for_customers(made: World) -> None:
    await made.fill(2)
    async with made.client() as client:
        assert (await client.get(ENTRIES)).status_code == 403


async def test_another_s_request_is_as_one_that_never_was(made: World) -> None:
    request_id = await made.say(b"mine alone", b"[]")
    async with made.client(STRANGER) as client:
        theirs = await client.get(f"/api/audit/requests/{request_id}")
        none = await client.get("/api/audit/requests/req_" + "0" * 24)
    assert theirs.status_code == none.status_code == 404
    assert theirs.json()["error"]["message"] == none.json()["error"]["message"]
    assert "mine alone" not in theirs.text


async def test_operator_sees_the_entry_and_not_what_was_said(made: World) -> None:
    request_id = await made.say(b"private", b"answer")
    async with made.client(OPERATOR) as client:
        answer = await client.get(f"/api/audit/requests/{request_id}")
    assert answer.status_code == 200
    assert answer.json()["content"] is None
    assert "private" not in answer.text


@pytest.mark.parametrize(
    "request_id", ["%27%20OR%201=1%20--", "a" * 300, "req_%00", "%F0%9F%98%80"]
)
async def test_request_id_that_is_hostile_is_404(made: World, request_id: str) -> None:
    await made.fill(1)
    async with made.client() as client:
        assert (await client.get(f"/api/audit/requests/{request_id}")).status_code == 404


async def test_log_changed_under_it_gives_no_proof(made: World) -> None:
    ids = await made.fill(5)
    async with made.database.begin() as connection:
        await connection.execute(
            text('UPDATE audit_entries SET leaf_hash = entry WHERE "index" = 3')
        )
    async with made.client() as client:
        for path in (
            f"{INCLUSION}?leaf=1",
            f"/api/audit/requests/{ids[0]}",
            f"{CONSISTENCY}?from=2",
        ):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert "fortpoint audit verify" in answer.json()["error"]["message"]


async def _cosign(client: httpx.AsyncClient, note: bytes) -> httpx.Response:
    return await client.post(COSIGNATURE, json={"note": note.decode()})


async def test_cosignature_that_is_not_one_is_400(made: World) -> None:
    await made.fill(3)
    note = await made.prover.checkpoint()
    good = cosigner().cosign(note, 1_800_000_000)
    await made.fill(1)
    other = await made.prover.checkpoint()
    bad = {
        "no line": note,
        "unknown witness": cosigner(9).cosign(note, 1),
        "another text": good.replace(b"\n3\n", b"\n2\n"),
        "changed": good[:-10] + b"AAAAAAAA" + good[-2:],
        "rubbish": b"rubbish",
        "one good, one bad": good + cosigner(2).cosign(other, 1).splitlines(keepends=True)[-1],
    }
    async with made.client() as client:
        for name, one in bad.items():
            assert (await _cosign(client, one)).status_code == 400, name
        assert (await client.get(f"{CHECKPOINT}?witnesses=1")).status_code == 404


async def test_cosigned_checkpoint_of_a_fork_by_the_log_s_own_key_is_400(
    made: World, tmp_path: Path
) -> None:
    await made.fill(4)
    async with world(made.home, str(tmp_path / "fork.db")) as fork:
        await fork.fill(3)
        note = await fork.prover.checkpoint()
    async with made.client() as client:
        answer = await _cosign(client, cosigner().cosign(note, 1))
    assert answer.status_code == 400
    assert "another history" in answer.json()["error"]["message"]


# ---- what holds ----


async def test_inclusion_proofs_lead_to_the_signed_root(made: World) -> None:
    await made.fill(300)
    async with made.client() as client:
        note = (await client.get(CHECKPOINT)).content
        signed = made.key.open_checkpoint(note)
        for index in (0, 1, 127, 255, 256, 299):
            proof = (await client.get(f"{INCLUSION}?leaf={index}&size={signed.size}")).json()
            leaf = bytes.fromhex(proof["leaf_hash"])
            root = inclusion_root(leaf, index, signed.size, hashes(proof["path"]))
            assert root == signed.root_hash
            assert proof["root_hash"] == root.hex()


async def test_consistency_proof_leads_from_a_kept_checkpoint_to_the_newest(made: World) -> None:
    await made.fill(130)
    async with made.client() as client:
        old = made.key.open_checkpoint((await client.get(CHECKPOINT)).content)
        await made.fill(170)
        new = made.key.open_checkpoint((await client.get(CHECKPOINT)).content)
        proof = (await client.get(f"{CONSISTENCY}?from={old.size}&to={new.size}")).json()
    path = hashes(proof["path"])
    check_consistency(old.size, old.root_hash, new.size, new.root_hash, path)
    with pytest.raises(VerificationError):
        check_consistency(old.size, bytes(32), new.size, new.root_hash, path)


async def test_looking_at_hashes_leaves_the_log_at_rest(made: World) -> None:
    await made.fill(3)
    async with made.client() as client:
        for path in (CHECKPOINT, f"{INCLUSION}?leaf=1", f"{CONSISTENCY}?from=1"):
            assert (await client.get(path)).status_code == 200
    assert await count(made) == 3


async def test_own_request_comes_with_entry_proof_and_content(made: World) -> None:
    await made.fill(2)
    request_id = await made.say(b'{"ask": 1}', b'["answer"]')
    async with made.client() as client:
        proof = (await client.get(f"/api/audit/requests/{request_id}")).json()
    signed = made.key.open_checkpoint(proof["checkpoint"].encode())
    leaf = leaf_hash(proof["entry"].encode())
    assert leaf.hex() == proof["leaf_hash"]
    assert inclusion_root(leaf, 2, signed.size, hashes(proof["path"])) == signed.root_hash
    assert proof["content"]["request"] == '{"ask": 1}'
    assert proof["fortpoint"]["audit"]["index"] == 3  # that it was asked for is recorded


async def test_entries_come_in_pages_with_their_very_bytes(made: World) -> None:
    await made.fill(5)
    async with made.client(OPERATOR) as client:
        first = (await client.get(f"{ENTRIES}?start=1&limit=3")).json()
        rest = (await client.get(f"{ENTRIES}?start={first['next']}&limit=100")).json()
    assert [one["index"] for one in first["data"]] == [1, 2, 3]
    assert rest["next"] is None
    for one in first["data"]:
        assert leaf_hash(one["entry"].encode()).hex() == one["leaf_hash"]


async def test_cosignatures_are_kept_and_served_with_their_checkpoint(made: World) -> None:
    ids = await made.fill(3)
    async with made.client() as client:
        note = (await client.get(CHECKPOINT)).content
        for number in (1, 2):
            answer = await _cosign(client, cosigner(number).cosign(note, 1_800_000_000 + number))
            assert answer.json() == {"witnesses": [f"witness/{number}"]}
        await made.fill(2)
        later = (await client.get(CHECKPOINT)).content
        await _cosign(client, cosigner(1).cosign(later, 1_800_000_009))
        both = (await client.get(f"{CHECKPOINT}?witnesses=2")).content
        one = (await client.get(f"{CHECKPOINT}?witnesses=1")).content
        proof = (await client.get(f"/api/audit/requests/{ids[2]}?witnesses=2")).json()
        unseen = await client.get(f"/api/audit/requests/{(await made.fill(1))[0]}?witnesses=1")
    assert both.startswith(note)
    assert [cosigner(n).key.open(both) for n in (1, 2)] == [1_800_000_001, 1_800_000_002]
    assert made.key.open_checkpoint(one).size == 5
    assert proof["size"] == 3
    assert unseen.status_code == 404


async def test_many_cosigned_sizes_are_not_kept_for_ever(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fortpoint.audit.prover.KEPT_COSIGNED", 3)
    for _ in range(8):
        await made.log.append(entry(0))
        note = await made.prover.checkpoint()
        await made.prover.add_cosignature(cosigner().cosign(note, 1))
    async with made.database.connect() as connection:
        found = (await connection.execute(text("SELECT size FROM audit_cosignatures"))).all()
    assert sorted(size for (size,) in found) == [6, 7, 8]


async def test_key_of_the_customer_works_for_a_witness(made: World) -> None:
    await made.fill(1)
    async with made.client(CUSTOMER) as client:
        assert (await client.get(CHECKPOINT)).headers["content-type"].startswith("text/plain")
