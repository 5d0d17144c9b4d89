"""A witness: it vouches for what continues, and keeps the evidence of what does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner, Result

from audit_world import cosigner
from fortpoint.audit.checkpoint import Signer
from fortpoint.audit.cosignature import WitnessKey
from fortpoint.audit.merkle import Frontier, leaf_hash, node_hash
from fortpoint.audit.proofs import consistency_proof
from fortpoint.audit.witness import Inconsistent, Witness
from fortpoint.cli import audit
from fortpoint.errors import ConfigError, VerificationError

SIGNER = Signer("fortpoint/test", Ed25519PrivateKey.from_private_bytes(bytes(32)))


class Log:
    """A log whose history can be rewritten under the same key."""

    def __init__(self, size: int) -> None:
        self.leaves = [leaf_hash(b"%d" % n) for n in range(size)]

    def grow(self, n: int) -> None:
        self.leaves += [leaf_hash(b"%d" % (len(self.leaves) + at)) for at in range(n)]

    def rewrite(self, index: int) -> None:
        self.leaves[index] = leaf_hash(b"rewritten")

    def note(self) -> bytes:
        frontier = Frontier().extend(self.leaves)
        return SIGNER.sign_checkpoint(frontier.size, frontier.root())

    def node(self, height: int, number: int) -> bytes:
        if height == 0:
            return self.leaves[number]
        return node_hash(self.node(height - 1, 2 * number), self.node(height - 1, 2 * number + 1))

    def proof(self, old: int, new: int) -> Sequence[bytes]:
        return consistency_proof(old, new, self.node)


@pytest.fixture
def log() -> Log:
    return Log(11)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def witness(state: Path) -> Witness:
    return Witness(state, SIGNER.verifier, cosigner())


def test_first_checkpoint_is_remembered_and_cosigned(witness: Witness, log: Log) -> None:
    cosigned = witness.check(log.note(), log.proof)
    assert cosigner().key.open(cosigned) > 1_700_000_000
    seen = witness.seen()
    assert seen is not None
    assert seen.size == 11


def test_growth_is_cosigned_again_and_again(witness: Witness, log: Log) -> None:
    for _ in range(20):
        log.grow(7)
        cosigner().key.open(witness.check(log.note(), log.proof))
    seen = witness.seen()
    assert seen is not None
    assert seen.size == 151


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda log: log.leaves.pop(), "entries were taken away"),
        (lambda log: log.rewrite(3), "not the same ones"),
        (lambda log: (log.rewrite(3), log.grow(5)), "its history was rewritten"),
        (lambda log: (log.leaves.insert(0, bytes(32)), log.grow(2)), "its history was rewritten"),
    ],
)
def test_history_rewritten_is_refused_with_both_checkpoints_as_evidence(
    witness: Witness, log: Log, state: Path, change: object, said: str
) -> None:
    before = log.note()
    witness.check(before, log.proof)
    change(log)  # type: ignore[operator]
    with pytest.raises(Inconsistent, match=said) as caught:
        witness.check(log.note(), log.proof)
    evidence = json.loads(caught.value.evidence.read_text())
    assert evidence["seen"].encode() == before
    assert evidence["shown"].encode() == log.note()
    for note in (evidence["seen"], evidence["shown"]):
        SIGNER.verifier.open_checkpoint(note.encode())
    seen = witness.seen()
    assert seen is not None
    assert seen.size == 11  # it is refused again tomorrow
    with pytest.raises(Inconsistent):
        witness.check(log.note(), log.proof)
    assert len(list(state.parent.glob("state.json.evidence-*"))) == 1


@pytest.mark.parametrize("proof", [[], [bytes(32)], [bytes(32)] * 200])
def test_proof_that_does_not_hold_is_refused(
    witness: Witness, log: Log, proof: list[bytes]
) -> None:
    witness.check(log.note(), log.proof)
    log.grow(6)
    with pytest.raises(Inconsistent):
        witness.check(log.note(), lambda old, new: proof)


def test_proof_that_is_not_given_is_no_evidence_and_no_cosignature(
    witness: Witness, log: Log, state: Path
) -> None:
    def refuses(old: int, new: int) -> Sequence[bytes]:
        raise VerificationError("the log answered 503")

    witness.check(log.note(), log.proof)
    log.grow(1)
    with pytest.raises(VerificationError) as caught:
        witness.check(log.note(), refuses)
    assert not isinstance(caught.value, Inconsistent)
    assert not list(state.parent.glob("*evidence*"))


def test_checkpoint_by_another_key_changes_nothing(witness: Witness, log: Log) -> None:
    witness.check(log.note(), log.proof)
    other = Signer("fortpoint/test", Ed25519PrivateKey.from_private_bytes(b"\x01" * 32))
    with pytest.raises(VerificationError, match="no signature"):
        witness.check(other.sign_checkpoint(99, bytes(32)), log.proof)
    seen = witness.seen()
    assert seen is not None
    assert seen.size == 11


@pytest.mark.parametrize("content", ["", "{}", '{"log":"x","checkpoint":"y"}', "[" * 10_000])
def test_state_that_cannot_be_read_is_not_a_fresh_start(
    witness: Witness, log: Log, state: Path, content: str
) -> None:
    state.write_text(content)
    with pytest.raises(VerificationError, match=r"state\.json"):
        witness.check(log.note(), log.proof)


# ---- the command ----


@contextmanager
def served(log: Log) -> Iterator[tuple[str, list[str]]]:
    """The log over HTTP, and the cosigned notes that were handed in."""
    kept: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != "Bearer sk-fp-witness":
                self._answer(401, b'{"error":{"message":"no key\\u001b[2J"}}')
            elif "consistency" in self.path:
                asked = parse_qs(urlsplit(self.path).query)
                path = log.proof(int(asked["from"][0]), int(asked["to"][0]))
                self._answer(200, json.dumps({"path": [one.hex() for one in path]}).encode())
            else:
                self._answer(200, log.note())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.append(json.loads(body)["note"])
            self._answer(200, b"{}")

        def log_message(self, *_: object) -> None:
            return

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP_WITNESS_KEY", "sk-fp-witness")
    (tmp_path / "audit.pub").write_text(f"{SIGNER.verifier}\n")
    return tmp_path


def look(url: str, folder: Path, *more: str) -> Result:
    arguments = ["witness", "--log", url, "--key", str(folder / "audit.pub"), "--once"]
    arguments += ["--state", str(folder / "seen"), "--api-key", "env:FP_WITNESS_KEY", *more]
    return CliRunner().invoke(audit.app, arguments)


def test_command_cosigns_growth_and_exits_3_at_a_rewritten_log(folder: Path, log: Log) -> None:
    with served(log) as (url, kept):
        first = look(url, folder, "--json")
        log.grow(5)
        second = look(url, folder)
        log.rewrite(2)
        log.grow(1)
        third = look(url, folder)
    own = WitnessKey.parse(json.loads(first.stdout.splitlines()[0])["witness"])
    assert [own.open(note.encode()) > 0 for note in kept] == [True, True]
    assert (first.exit_code, second.exit_code, third.exit_code) == (0, 0, 3)
    assert "16 entries" in second.stdout
    assert "continues 11; cosigned" in second.stdout
    assert "REFUSED: the log of 17 entries does not continue the one of 16" in third.stdout
    assert len(list(folder.glob("seen.evidence-*.json"))) == 1
    assert (folder / "seen.ed25519").stat().st_mode & 0o777 == 0o600


def test_command_without_an_answer_says_so_and_vouches_for_nothing(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = look("http://127.0.0.1:1", folder)
    monkeypatch.setenv("FP_WITNESS_KEY", "sk-fp-wrong")
    with served(log) as (url, kept):
        refused = look(url, folder)
    assert isinstance(gone.exception, VerificationError)
    assert isinstance(refused.exception, VerificationError)
    assert refused.exception.message == "the log answered 401: no key?[2J"
    assert kept == []
    assert not (folder / "seen").exists()


@pytest.mark.parametrize("url", ["http://log.example", "ftp://x", "https://u:p@h", "nonsense"])
def test_command_with_an_unsafe_address_is_refused(folder: Path, url: str) -> None:
    assert isinstance(look(url, folder).exception, ConfigError)


@pytest.mark.parametrize("reference", ["sk-fp-key", "env:FP_NOT_SET", "env:"])
def test_command_takes_a_key_by_reference_only(folder: Path, reference: str) -> None:
    result = look("http://127.0.0.1:1", folder, "--api-key", reference)
    assert isinstance(result.exception, ConfigError)
