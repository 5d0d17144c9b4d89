"""Every key that encrypts keys keeps one contract; and what each refuses for itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from fortpoint.errors import ConfigError, KeyUnavailable, SealBroken
from fortpoint.vault.key_encryption import KeyEncryption, Keyring, PassphraseFile, read_secret
from fortpoint.vault.key_sources import key_encryption
from fortpoint.vault.transit import Transit
from sealing import TOKEN, FakeKeyring, FakeTransit, passphrase

MOUNT = "https://vault.test:8200/v1/transit"
Made = Callable[[], KeyEncryption]


def transit(server: httpx.BaseTransport, token: str = TOKEN) -> Transit:
    return Transit(MOUNT, "fortpoint", lambda: token, server)


@pytest.fixture(params=["passphrase-file", "keyring", "transit"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Makes a KEK that shares nothing with the one made before."""

    def made() -> KeyEncryption:
        if request.param == "passphrase-file":
            return passphrase(tmp_path, secrets.token_hex(16))
        if request.param == "keyring":
            return Keyring(FakeKeyring())
        return transit(FakeTransit())

    return made


def test_key_wrapped_opens_for_the_same_purpose(make: Made) -> None:
    kek, key = make(), secrets.token_bytes(32)
    wrapped = kek.wrap(key, b"model a")
    assert kek.unwrap(wrapped, b"model a") == key
    assert wrapped.kind == kek.kind


def test_key_wrapped_for_another_purpose_is_refused(make: Made) -> None:
    kek = make()
    wrapped = kek.wrap(secrets.token_bytes(32), b"model a")
    with pytest.raises(SealBroken):
        kek.unwrap(wrapped, b"model b")


def test_key_wrapped_by_another_kek_is_refused(make: Made) -> None:
    wrapped = make().wrap(secrets.token_bytes(32), b"model a")
    other = make()
    other.wrap(secrets.token_bytes(32), b"so that a keyring has a key")
    with pytest.raises(SealBroken):
        other.unwrap(wrapped, b"model a")


def test_wrapping_twice_gives_two_texts_without_the_key(make: Made) -> None:
    kek, key = make(), secrets.token_bytes(32)
    first, second = (msgspec.json.encode(kek.wrap(key, b"m")) for _ in range(2))
    assert first != second
    assert key not in first
    assert key.hex().encode() not in first


@pytest.mark.parametrize("field", ["ciphertext", "nonce", "salt"])
def test_wrapped_key_with_a_changed_field_is_refused(tmp_path: Path, field: str) -> None:
    kek = passphrase(tmp_path)
    wrapped = kek.wrap(secrets.token_bytes(32), b"m")
    text = getattr(wrapped, field)
    for changed in ("", "%%%", text[:-4], ("A" if text[0] != "A" else "B") + text[1:]):
        with pytest.raises(SealBroken):
            kek.unwrap(msgspec.structs.replace(wrapped, **{field: changed}), b"m")


def test_wrapped_key_of_another_kind_is_named(tmp_path: Path) -> None:
    wrapped = passphrase(tmp_path).wrap(secrets.token_bytes(32), b"m")
    with pytest.raises(SealBroken, match=r"wrapped by 'passphrase-file', not by 'transit'"):
        transit(FakeTransit()).unwrap(wrapped, b"m")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_passphrase_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    kek = passphrase(tmp_path)
    next(tmp_path.iterdir()).chmod(mode)
    with pytest.raises(KeyUnavailable, match="chmod 600"):
        kek.wrap(secrets.token_bytes(32), b"m")


@pytest.mark.parametrize("text", ["", "short", "x" * 5000])
def test_passphrase_of_no_fit_length_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeyUnavailable, match="12 to 4096 bytes"):
        passphrase(tmp_path, text).wrap(secrets.token_bytes(32), b"m")


def test_passphrase_file_that_is_absent_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyUnavailable, match="No such file"):
        PassphraseFile(tmp_path / "none").wrap(bytes(32), b"m")
    with pytest.raises(KeyUnavailable):
        PassphraseFile(tmp_path).wrap(bytes(32), b"m")


def test_secret_is_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"one two\r\nthree\n")
    path.chmod(0o600)
    assert read_secret(path) == b"one two"


def test_keyring_that_lost_its_key_says_so() -> None:
    backend = FakeKeyring()
    kek = Keyring(backend)
    wrapped = kek.wrap(secrets.token_bytes(32), b"m")
    backend.held.clear()
    with pytest.raises(KeyUnavailable, match="holds no key"):
        kek.unwrap(wrapped, b"m")


def test_keyring_that_is_locked_says_so() -> None:
    class Locked(FakeKeyring):
        def get_password(self, service: str, account: str) -> str | None:
            raise RuntimeError("locked: secret detail")

    with pytest.raises(KeyUnavailable, match="cannot be used: RuntimeError"):
        Keyring(Locked()).wrap(bytes(32), b"m")


def test_transit_down_is_unavailable_and_says_that_nothing_was_opened() -> None:
    server = FakeTransit()
    wrapped = transit(server).wrap(secrets.token_bytes(32), b"m")
    server.down = True
    with pytest.raises(KeyUnavailable, match=r"does not answer \(ConnectError\); nothing"):
        transit(server).unwrap(wrapped, b"m")


def test_transit_token_that_is_refused_is_in_no_message() -> None:
    with pytest.raises(KeyUnavailable, match="answered 403") as refused:
        transit(FakeTransit(), "hvs.wrong").wrap(secrets.token_bytes(32), b"m")
    assert "hvs.wrong" not in str(refused.value)


def test_transit_sends_its_token_in_a_header_alone() -> None:
    server = FakeTransit()
    transit(server).wrap(secrets.token_bytes(32), b"m")
    assert [str(request.url) for request in server.asked] == [f"{MOUNT}/encrypt/fortpoint"]
    assert TOKEN.encode() not in server.asked[0].content


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b"["),
        httpx.Response(200, json={"data": {"ciphertext": 5}}),
        httpx.Response(200, json={"data": None}),
        httpx.Response(200, json=[1]),
        httpx.Response(200, content=b"x" * 100_000),
        httpx.Response(302, headers={"Location": "http://elsewhere.test"}),
        httpx.Response(503),
    ],
)
def test_transit_answer_that_is_none_is_refused(answer: httpx.Response) -> None:
    server = httpx.MockTransport(lambda request: answer)
    with pytest.raises(KeyUnavailable):
        transit(server).wrap(secrets.token_bytes(32), b"m")


def test_transit_key_of_another_length_is_refused() -> None:
    server = httpx.MockTransport(
        lambda request: httpx.Response(200, json={"data": {"plaintext": "AAAA", "ciphertext": "x"}})
    )
    kek = transit(server)
    with pytest.raises(SealBroken, match="no key"):
        kek.unwrap(kek.wrap(bytes(32), b"m"), b"m")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "passphrase",
        "passphrase-file:relative",
        "transit:http://vault.test/v1/transit/keys/k",
        "transit:https://user:secret@vault.test/v1/transit/keys/k",
        "transit:https://vault.test/v1/transit?x=1/keys/k",
        "transit:https://vault.test/v1/transit/keys/..%2f",
        "vault:thing",
    ],
)
def test_source_that_is_none_is_refused_without_its_text(source: str) -> None:
    with pytest.raises(ConfigError) as refused:
        key_encryption(source, "env:VAULT_TOKEN")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("passphrase-file:/run/secrets/x", "passphrase-file"),
        ("transit:https://vault.test:8200/v1/transit/keys/fortpoint", "transit"),
        ("transit:http://127.0.0.1:8200/v1/transit/keys/fortpoint", "transit"),
    ],
)
def test_source_names_its_kek(source: str, kind: str) -> None:
    assert key_encryption(source, "env:VAULT_TOKEN").kind == kind


def test_token_that_is_written_out_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        key_encryption("transit:https://vault.test/v1/transit/keys/k", "hvs.secret")
    assert "hvs" not in str(refused.value)


def test_token_that_is_absent_is_unavailable() -> None:
    kek = key_encryption("transit:https://vault.test/v1/transit/keys/k", "env:TOKEN", {})
    with pytest.raises(KeyUnavailable, match="no token"):
        kek.wrap(bytes(32), b"m")
