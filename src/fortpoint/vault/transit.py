"""A KEK that never leaves a HashiCorp Vault (or OpenBao): its transit engine wraps for us.

    kek = Transit("https://vault.example:8200/v1/transit", "fortpoint", read_token)

Transit's ``encrypt`` and ``decrypt`` with ``associated_data``, for a key of a type that takes
it (``aes256-gcm96``, the default): a wrapped key opens only for what it was wrapped for. The
server's own rotation and its audit of each use come with it.

Not protected here: whoever has the token can have keys unwrapped until it is revoked there.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from fortpoint.errors import ConfigError, KeyUnavailable, SealBroken
from fortpoint.vault.key_encryption import KEY_BYTES, WrappedKey, check_kind, decode

_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 64 * 1024
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Transit:
    """``mount`` is the address of the engine's mount, ``name`` that of its key."""

    kind = "transit"

    def __init__(
        self,
        mount: str,
        name: str,
        token: Callable[[], str],
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        parts = urlsplit(mount)
        encrypted = parts.scheme == "https"
        if not encrypted and (parts.scheme != "http" or parts.hostname not in _LOOPBACK):
            raise ConfigError("vault.key: transit needs https:// (http:// only to this machine)")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError("vault.key: transit's address holds no user, password or query")
        if not _NAME.fullmatch(name):
            raise ConfigError("vault.key: transit's key has a name of letters, digits, '.', '-'")
        self._mount = mount.rstrip("/")
        self._name = name
        self._token = token
        self._transport = transport

    def wrap(self, key: bytes, context: bytes) -> WrappedKey:
        body = {"plaintext": _encode(key)}
        return WrappedKey(self.kind, self._ask("encrypt", body, context, "ciphertext"))

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> bytes:
        check_kind(wrapped, self.kind)
        body = {"ciphertext": wrapped.ciphertext}
        key = decode(self._ask("decrypt", body, context, "plaintext"))
        if len(key) != KEY_BYTES:
            raise SealBroken("the key server returned something that is no key")
        return key

    def _ask(self, what: str, body: dict[str, str], context: bytes, field: str) -> str:
        body = {**body, "associated_data": _encode(context)}
        try:
            with (
                self._client() as client,
                client.stream(
                    "POST",
                    f"{self._mount}/{what}/{self._name}",
                    json=body,
                    headers={"X-Vault-Token": self._token(), "Accept-Encoding": "identity"},
                ) as response,
            ):
                raw = _read(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise KeyUnavailable(
                f"the key server does not answer ({type(error).__name__}); nothing was opened"
            ) from None
        if response.status_code == 400:
            raise SealBroken("the key server cannot open this key: another key, or changed bytes")
        if response.status_code != 200:
            raise KeyUnavailable(f"the key server answered {response.status_code}")
        return _field(raw, field)

    def _client(self) -> httpx.Client:
        """Neither proxies nor passwords of the environment: the token goes to one address."""
        return httpx.Client(timeout=_TIMEOUT_S, transport=self._transport, trust_env=False)


def _read(response: httpx.Response) -> bytes:
    if "Content-Encoding" in response.headers:
        raise KeyUnavailable("the key server's answer is compressed, which was not asked for")
    raw = b""
    for part in response.iter_bytes():
        raw += part
        if len(raw) > _MAX_ANSWER_BYTES:
            raise KeyUnavailable(f"the key server's answer has over {_MAX_ANSWER_BYTES} bytes")
    return raw


def _field(raw: bytes, name: str) -> str:
    try:
        answer: Any = json.loads(raw)
        text = answer["data"][name]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise KeyUnavailable("the key server's answer is not transit's")
    return text


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
