"""The stand-alone script and the product agree on what is good and on what was tampered with."""

from __future__ import annotations

import base64
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_world import SALT, World, cosigner, world
from fortpoint.audit.checkpoint import VerifierKey
from fortpoint.audit.entry import unseal
from fortpoint.audit.erasure import erase
from fortpoint.audit.export import export
from fortpoint.audit.merkle import leaf_hash
from fortpoint.audit.proofs import inclusion_root
from fortpoint.errors import InvalidRequest, VerificationError

SCRIPT = Path(__file__).parent.parent / "scripts" / "verify_audit.py"
MODULE = runpy.run_path(str(SCRIPT))
REQUEST = b'{"messages": "caf\xc3\xa9"}'
RESPONSE = b'["Golden Gate"]'


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    """A folder with a proof, the keys, and an export of 300 entries."""
    async with world(tmp_path / "home", str(tmp_path / "fortpoint.db")) as made:
        await made.fill(280)
        request_id = await made.say(REQUEST, RESPONSE)
        await made.fill(19)
        note = await made.prover.checkpoint()
        for number in (1, 2):
            await made.prover.add_cosignature(cosigner(number).cosign(note, 1_800_000_000))
        async with made.client() as client:
            answer = await client.get(f"/api/audit/requests/{request_id}?witnesses=2")
        _write(tmp_path, answer.content, made)
        export(tmp_path / "fortpoint.db", tmp_path / "log.jsonl")
    return tmp_path


def _write(folder: Path, proof: bytes, made: World) -> None:
    (folder / "proof.json").write_bytes(proof)
    (folder / "log.pub").write_text(f"{made.key}\n")
    for number in (1, 2, 3):
        (folder / f"w{number}.pub").write_text(f"{cosigner(number).key}\n")
    (folder / "request").write_bytes(REQUEST)
    (folder / "response").write_bytes(RESPONSE)


def ours(folder: Path, proof: dict[str, Any], witnesses: tuple[int, ...] = ()) -> bool:
    """What the product's own code says of a proof."""
    try:
        key = VerifierKey.parse((folder / "log.pub").read_text())
        note = proof["checkpoint"].encode()
        signed = key.open_checkpoint(note)
        for number in witnesses:
            cosigner(number).key.open(note)
        leaf = leaf_hash(proof["entry"].encode())
        path = [bytes.fromhex(one) for one in proof["path"]]
        root = inclusion_root(leaf, proof["index"], signed.size, path)
        same = root == signed.root_hash and proof["size"] == signed.size
        return same and unseal(proof["entry"].encode()).index == proof["index"]
    except (VerificationError, ValueError, KeyError):
        return False


def theirs(folder: Path, proof: object, *more: object) -> bool:
    (folder / "changed.json").write_text(json.dumps(proof))
    result = run("proof", folder / "changed.json", "--key", folder / "log.pub", *more)
    assert "Traceback" not in result.stderr
    verified: bool = json.loads(result.stdout)["verified"]
    assert result.returncode == (0 if verified else 1)
    return verified


def loaded(folder: Path) -> dict[str, Any]:
    proof: dict[str, Any] = json.loads((folder / "proof.json").read_bytes())
    return proof


def test_proof_holds_with_both_witnesses_and_what_was_said(made: Path) -> None:
    witnesses = ("--witness", made / "w1.pub", "--witness", made / "w2.pub")
    said = ("--request", made / "request", "--response", made / "response")
    result = run("proof", made / "proof.json", "--key", made / "log.pub", *witnesses, *said)
    found = json.loads(result.stdout)
    assert (found["verified"], found["index"], found["size"]) == (True, 280, 300)
    assert found["cosigned"] == {"witness/1": 1_800_000_000, "witness/2": 1_800_000_000}
    assert found["content"] == ["request", "response"]
    assert ours(made, loaded(made), (1, 2))


def _signature_changed(note: str) -> str:
    """The log's own line is the first."""
    text, _, lines = note.partition("\n\n")
    first, _, others = lines.partition("\n")
    return f"{text}\n\n{first[:-12]}AAAAAAAA{first[-4:]}\n{others}"


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "entry": lambda p: p.update(entry=p["entry"].replace('"status":200', '"status":403')),
    "entry and hash": lambda p: p.update(
        entry=p["entry"].replace("200", "201"),
        leaf_hash=leaf_hash(p["entry"].replace("200", "201").encode()).hex(),
    ),
    "index": lambda p: p.update(index=p["index"] - 1),
    "index beyond": lambda p: p.update(index=300),
    "size": lambda p: p.update(size=299),
    "path cut": lambda p: p["path"].pop(),
    "path longer": lambda p: p["path"].append("00" * 32),
    "path reordered": lambda p: p["path"].reverse(),
    "path bit": lambda p: p["path"].__setitem__(2, "00" + p["path"][2][2:]),
    "path empty": lambda p: p["path"].clear(),
    "note's size": lambda p: p.update(checkpoint=p["checkpoint"].replace("\n300\n", "\n301\n")),
    "note cut": lambda p: p.update(checkpoint=p["checkpoint"][:80]),
    "note signature": lambda p: p.update(checkpoint=_signature_changed(p["checkpoint"])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_proof_changed_is_refused_by_both(made: Path, name: str) -> None:
    proof = loaded(made)
    CHANGES[name](proof)
    assert not ours(made, proof)
    assert not theirs(made, proof)


def test_proof_under_another_key_or_without_a_witness_is_refused_by_both(made: Path) -> None:
    proof = loaded(made)
    assert not ours(made, proof, (3,))
    assert not theirs(made, proof, "--witness", made / "w3.pub")
    key = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32).public_key().public_bytes_raw()
    (made / "log.pub").write_text(f"{VerifierKey('fortpoint/other', key)}\n")
    assert not ours(made, proof)
    assert not theirs(made, proof)


@pytest.mark.parametrize("proof", [None, [], "text", {}, {"object": "audit.proof"}, 3])
def test_proof_that_is_none_is_a_clear_line(made: Path, proof: object) -> None:
    assert not theirs(made, proof)


def test_request_that_was_not_sent_is_refused(made: Path) -> None:
    (made / "request").write_bytes(b"{}")
    assert not theirs(made, loaded(made), "--request", made / "request")


# ---- Ed25519 without a library ----


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80), st.integers(0, 95))
@settings(max_examples=25, deadline=None)
def test_own_ed25519_agrees_with_the_library(seed: bytes, message: bytes, at: int) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = private.public_key().public_bytes_raw(), private.sign(message)
    holds = MODULE["ed25519_holds"]
    assert holds(public, signature, message)
    changed = bytearray(public + signature)
    changed[at] ^= 1
    assert not holds(bytes(changed[:32]), bytes(changed[32:]), message)
    assert not holds(public, signature, message + b"x")


def test_own_ed25519_knows_the_published_vectors() -> None:
    # RFC 8032 section 7.1, tests 1 to 3.
    vectors = [
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ]
    holds, order = MODULE["ed25519_holds"], MODULE["ORDER"]
    for public, message, signature in vectors:
        key, said, signed = map(bytes.fromhex, (public, message, signature))
        assert holds(key, signed, said)
        # S + L verifies under a lax check: a second signature for the same text.
        s = int.from_bytes(signed[32:], "little") + order
        assert not holds(key, signed[:32] + s.to_bytes(32, "little"), said)
        assert not holds(key, signed[:40], said)
    assert not holds(b"\xff" * 32, bytes(64), b"")


# ---- an exported log ----


def exported(folder: Path, lines: list[bytes]) -> bool:
    (folder / "changed.jsonl").write_bytes(b"".join(lines))
    result = run("log", folder / "changed.jsonl", "--key", folder / "log.pub")
    assert "Traceback" not in result.stderr
    verified: bool = json.loads(result.stdout)["verified"]
    return verified


def test_export_verifies_and_holds_nothing_that_was_said(made: Path) -> None:
    data = (made / "log.jsonl").read_bytes()
    assert exported(made, data.splitlines(keepends=True))
    assert SALT.hex().encode() not in data
    assert base64.b64encode(SALT) not in data
    assert b"Golden Gate" not in data
    assert data.count(b"\n") == 301 + data.count(b'{"checkpoint":')


def test_export_to_a_file_that_exists_is_refused(made: Path) -> None:
    with pytest.raises(InvalidRequest, match="there already"):
        export(made / "fortpoint.db", made / "log.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines[:-1], lines[-1][:-1]],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:9], *lines[10:]],
        lambda lines: [*lines[:9], lines[9], lines[9], *lines[10:]],
        lambda lines: [*lines[:9], lines[9].replace(b"200", b"403", 1), *lines[10:]],
        lambda lines: [*lines[:9], b"rubbish\n", *lines[9:]],
        lambda lines: [*lines[:9], b'{"checkpoint":1}\n', *lines[9:]],
        lambda lines: [line for line in lines if not line.startswith(b'{"checkpoint"')],
        lambda lines: [*lines, lines[0]],
        lambda lines: [b"[" * 100_000 + b"\n"],
    ],
)
def test_export_changed_is_refused(
    made: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = (made / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert not exported(made, change(lines))


# ---- erasure ----


async def test_erasure_takes_the_content_and_leaves_every_proof(
    tmp_path: Path, database_address: str
) -> None:
    async with world(tmp_path / "home", database_address) as made:
        request_id = await made.say(REQUEST, RESPONSE)
        async with made.client() as client:
            before = (await client.get(f"/api/audit/requests/{request_id}")).json()
            await made.database.write(lambda connection: erase(connection, request_id))
            after = (await client.get(f"/api/audit/requests/{request_id}")).json()
        _write(tmp_path, json.dumps(after).encode(), made)
        assert before["content"]["request"] == REQUEST.decode()
        assert after["content"] is None
        assert after["entry"] == before["entry"]
        assert SALT.hex() not in json.dumps(after)
        assert theirs(tmp_path, after)
        assert theirs(tmp_path, before)  # what was handed out stays true
        assert not theirs(tmp_path, after, "--request", tmp_path / "request")
