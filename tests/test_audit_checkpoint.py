"""Signed notes and checkpoints: the published vectors, and everything that must not open."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.audit.checkpoint import Checkpoint, Signer, VerifierKey
from fortpoint.errors import VerificationError

# The example of the signed-note format: golang.org/x/mod/sumdb/note, package documentation
# and note_test.go; c2sp.org/signed-note refers to it.
VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SKEY = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
SIGNATURE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotp"
    "RZb6KE6RyyBwJnAM=\n"
)
NOTE = f"{TEXT}\n{SIGNATURE}".encode()


def signer(name: str = "fortpoint/test", seed: bytes = bytes(32)) -> Signer:
    return Signer(name, Ed25519PrivateKey.from_private_bytes(seed))


def test_verifier_key_of_the_published_example_reads_and_writes() -> None:
    key = VerifierKey.parse(VKEY)
    assert key.name == "PeterNeumann"
    assert str(key) == VKEY
    assert VerifierKey.parse(VKEY + "\n") == key


def test_note_of_the_published_example_opens() -> None:
    assert VerifierKey.parse(VKEY).open(NOTE) == TEXT


def test_note_signed_with_the_published_key_equals_the_example() -> None:
    seed = base64.b64decode(SKEY.split("+", 4)[4])[1:]
    peter = Signer("PeterNeumann", Ed25519PrivateKey.from_private_bytes(seed))
    assert peter.sign(TEXT) == NOTE
    assert str(peter.verifier) == VKEY


def test_note_with_a_witness_signature_too_opens() -> None:
    witness = signer("witness.example").sign(TEXT).decode().rpartition("\n\n")[2]
    for signatures in (SIGNATURE + witness, witness + SIGNATURE):
        assert VerifierKey.parse(VKEY).open(f"{TEXT}\n{signatures}".encode()) == TEXT


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\n\n",
        TEXT.encode(),
        NOTE.replace(b"cryptography", b"cryptographY"),
        NOTE.replace("—".encode(), b"-"),
        NOTE.replace(b"PeterNeumann", b"PeterNeumanm"),
        NOTE.replace(b"x08go", b"x08gp"),
        NOTE.replace(b"JnAM=", b"JnAN="),
        NOTE.replace(b"JnAM=", b"JnAM"),
        NOTE.removesuffix(b"\n"),
        NOTE + b"\n",
        NOTE + SIGNATURE.replace("ZJku", "AAAA").encode(),
        NOTE[:-60] + b"\n",
        b"\xff" + NOTE,
        NOTE + b"x" * 20_000,
    ],
)
def test_note_changed_is_refused(note: bytes) -> None:
    with pytest.raises(VerificationError):
        VerifierKey.parse(VKEY).open(note)


@given(st.integers(0, len(NOTE) - 1), st.integers(1, 255))
def test_note_with_any_byte_changed_is_refused(at: int, mask: int) -> None:
    changed = bytearray(NOTE)
    changed[at] ^= mask
    with pytest.raises(VerificationError):
        VerifierKey.parse(VKEY).open(bytes(changed))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PeterNeumann",
        "PeterNeumann+c74f20a3",
        "PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+C74F20A3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+c74f20a3+AhpC2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10T",
        "Peter Neumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        SKEY,
    ],
)
def test_verifier_key_malformed_is_refused(text: str) -> None:
    with pytest.raises(VerificationError):
        VerifierKey.parse(text)


def test_checkpoint_signed_opens_and_has_the_c2sp_form() -> None:
    root = bytes(range(32))
    note = signer().sign_checkpoint(18, root)
    origin, size, encoded, blank, signature, end = note.decode().split("\n")
    assert (origin, size, blank, end) == ("fortpoint/test", "18", "", "")
    assert base64.b64decode(encoded) == root
    assert signature.startswith("— fortpoint/test ")
    assert signer().verifier.open_checkpoint(note) == Checkpoint("fortpoint/test", 18, root)


def test_checkpoint_with_an_extension_line_opens() -> None:
    note = signer().sign(Checkpoint("fortpoint/test", 1, bytes(32)).text() + "extension\n")
    assert signer().verifier.open_checkpoint(note).size == 1


@pytest.mark.parametrize(
    "text",
    [
        "fortpoint/test\n1\n",
        "fortpoint/test\n01\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "fortpoint/test\n-1\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "fortpoint/test\n٣\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "fortpoint/test\n" + "9" * 5000 + "\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "fortpoint/test\n1\n" + base64.b64encode(bytes(31)).decode() + "\n",
        "fortpoint/test\n1\nnot base64\n",
        "fortpoint/other\n1\n" + base64.b64encode(bytes(32)).decode() + "\n",
    ],
)
def test_checkpoint_malformed_is_refused_although_signed(text: str) -> None:
    note = signer().sign(text)
    with pytest.raises(VerificationError):
        signer().verifier.open_checkpoint(note)


def test_checkpoint_signed_by_another_key_of_the_same_name_is_refused() -> None:
    note = signer(seed=b"\x01" * 32).sign_checkpoint(1, bytes(32))
    with pytest.raises(VerificationError, match="no signature"):
        signer().verifier.open_checkpoint(note)


@pytest.mark.parametrize("text", ["", "no newline", "a\n\nb\n", "\na\n"])
def test_text_that_would_frame_another_note_is_not_signed(text: str) -> None:
    with pytest.raises(ValueError, match="text"):
        signer().sign(text)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b"])
def test_key_name_that_would_break_the_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        signer(name)
