"""Keys that encrypt keys (KEK): a data key leaves memory only wrapped by one of them.

    kek = PassphraseFile(Path("/run/secrets/fortpoint"))
    wrapped = kek.wrap(data_key, b"model sha256:...")
    kek.unwrap(wrapped, b"model sha256:...") == data_key

A passphrase becomes a KEK by Argon2id (RFC 9106, second recommended parameters); the keyring
holds a random one. Both wrap with AES-256-GCM. ``context`` says what the key is for and is
authenticated with it: a wrapped key that is put in another's place does not open.
``transit.py`` asks a HashiCorp Vault instead, whose KEK never leaves it.

Not protected here: a process that can read the passphrase file, or ask the user's keyring.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from fortpoint.errors import ConfigError, KeyUnavailable, SealBroken

KEY_BYTES = 32
MIN_PASSPHRASE_BYTES = 12
MAX_PASSPHRASE_BYTES = 4096

_NONCE_BYTES = 12
_SALT_BYTES = 16
_PURPOSE = b"fortpoint wrapped key v1\0"
_ITERATIONS, _LANES, _MEMORY_KIB = 3, 4, 64 * 1024


class WrappedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key that only its KEK opens. ``kind`` names the KEK's; the rest is Base64 or its text."""

    kind: str
    ciphertext: str
    nonce: str = ""
    salt: str = ""


class KeyEncryption(Protocol):
    """One KEK. Both raise ``KeyUnavailable`` when it cannot be used now."""

    kind: str

    def wrap(self, key: bytes, context: bytes) -> WrappedKey: ...

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        """Also raises ``SealBroken`` for another KEK, another context, or changed bytes."""
        ...


class PassphraseFile:
    """A KEK made of the first line of a file that only its owner can read."""

    kind = "passphrase-file"

    def __init__(self, path: Path) -> None:
        self._path = path

    def wrap(self, key: bytes, context: bytes) -> WrappedKey:
        salt = secrets.token_bytes(_SALT_BYTES)
        return _wrap(self.kind, self._kek(salt), key, context, salt)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        check_kind(wrapped, self.kind)
        salt = decode(wrapped.salt)
        if len(salt) != _SALT_BYTES:
            raise SealBroken("the wrapped key is damaged: its salt has another length")
        return _unwrap(wrapped, self._kek(salt), context)

    def _kek(self, salt: bytes) -> bytes:
        derive = Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=_ITERATIONS,
            lanes=_LANES,
            memory_cost=_MEMORY_KIB,
        )
        return derive.derive(read_secret(self._path, MIN_PASSPHRASE_BYTES))


class Keyring:
    """A random KEK in the operating system's keyring (the ``keyring`` package)."""

    kind = "keyring"
    _SERVICE, _ACCOUNT = "fortpoint", "key-encryption-key"

    def __init__(self, backend: Any = None) -> None:
        self._backend = backend or _keyring()

    def wrap(self, key: bytes, context: bytes) -> WrappedKey:
        if self._ask(lambda: self._backend.get_password(self._SERVICE, self._ACCOUNT)) is None:
            made = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
            self._ask(lambda: self._backend.set_password(self._SERVICE, self._ACCOUNT, made))
        return _wrap(self.kind, self._kek(), key, context)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        check_kind(wrapped, self.kind)
        return _unwrap(wrapped, self._kek(), context)

    def _kek(self) -> bytes:
        held = self._ask(lambda: self._backend.get_password(self._SERVICE, self._ACCOUNT))
        if held is None:
            raise KeyUnavailable("the keyring holds no key of Fort Point; unlock or restore it")
        kek = decode(str(held))
        if len(kek) != KEY_BYTES:
            raise KeyUnavailable("the keyring's key of Fort Point is damaged; restore it")
        return kek

    @staticmethod
    def _ask(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - backends raise what they like
            raise KeyUnavailable(f"the keyring cannot be used: {type(error).__name__}") from None


def read_secret(path: Path, min_bytes: int = 1) -> bytes:
    """The first line of a file that nobody but its owner may read. Raises ``KeyUnavailable``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077:
                raise KeyUnavailable(
                    f"{path.name} must be a file that only its owner can read: chmod 600"
                )
            text = file.read(MAX_PASSPHRASE_BYTES + 1)
    except OSError as error:
        raise KeyUnavailable(f"{path.name} cannot be read: {error.strerror}") from None
    line = text.partition(b"\n")[0].rstrip(b"\r")
    if not min_bytes <= len(line) <= MAX_PASSPHRASE_BYTES:
        raise KeyUnavailable(
            f"the first line of {path.name} must have {min_bytes} to {MAX_PASSPHRASE_BYTES} bytes"
        )
    return line


def check_kind(wrapped: WrappedKey, kind: str) -> None:
    if wrapped.kind != kind:
        raise SealBroken(
            f"the key was wrapped by {wrapped.kind[:32]!r}, not by {kind!r}: set vault.key to it"
        )


def decode(text: str) -> bytes:
    """Base64. Raises ``SealBroken``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SealBroken("the wrapped key is damaged: it is not Base64") from None


def _wrap(kind: str, kek: bytes, key: bytes, context: bytes, salt: bytes = b"") -> WrappedKey:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(kek).encrypt(nonce, key, _PURPOSE + context)
    return WrappedKey(kind, *(base64.b64encode(part).decode() for part in (sealed, nonce, salt)))


def _unwrap(wrapped: WrappedKey, kek: bytes, context: bytes) -> bytes:
    nonce = decode(wrapped.nonce)
    if len(nonce) != _NONCE_BYTES:
        raise SealBroken("the wrapped key is damaged: its nonce has another length")
    try:
        return AESGCM(kek).decrypt(nonce, decode(wrapped.ciphertext), _PURPOSE + context)
    except InvalidTag:
        raise SealBroken(
            "the key does not open: another passphrase or keyring, or changed bytes"
        ) from None


def _keyring() -> Any:
    try:
        import keyring  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            "vault.key is keyring, and the keyring package is not installed: pip install keyring"
        ) from None
    return keyring
