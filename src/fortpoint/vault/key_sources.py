"""From a line of configuration to the KEK that it names.

    vault.key = "passphrase-file:/run/secrets/fortpoint"
    vault.key = "keyring"
    vault.key = "transit:https://vault.example:8200/v1/transit/keys/fortpoint"

Transit's token is where ``vault.transit_token`` says: ``env:NAME`` or ``file:/path``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fortpoint.errors import ConfigError, KeyUnavailable
from fortpoint.vault.key_encryption import KeyEncryption, Keyring, PassphraseFile, read_secret

_TRANSIT = re.compile(r"transit:(?P<mount>.+)/keys/(?P<name>[^/]+)")
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_TOKEN = re.compile(r"[\x21-\x7e]{1,1024}")


def key_encryption(
    source: str, token: str, environ: Mapping[str, str] = os.environ
) -> KeyEncryption:
    """The KEK that ``source`` names. Raises ``ConfigError``; no key is read or asked for yet."""
    if source == Keyring.kind:
        return Keyring()
    if source.startswith(f"{PassphraseFile.kind}:"):
        path = Path(source.partition(":")[2])
        if not path.is_absolute():
            raise ConfigError("vault.key: passphrase-file has an absolute path")
        return PassphraseFile(path)
    if match := _TRANSIT.fullmatch(source):
        from fortpoint.vault.transit import Transit

        return Transit(match["mount"], match["name"], _token(token, environ))
    raise ConfigError(
        "vault.key must be passphrase-file:/path, keyring, or "
        "transit:https://host:8200/v1/transit/keys/NAME"
    )


def _token(reference: str, environ: Mapping[str, str]) -> Callable[[], str]:
    """Read when it is used, so that a token that was renewed counts."""
    if match := _ENV.fullmatch(reference):
        variable = match[1]
        return lambda: _checked(environ.get(variable, ""))
    if reference.startswith("file:/"):
        path = Path(reference.removeprefix("file:"))
        return lambda: _checked(read_secret(path).decode("ascii", "replace"))
    raise ConfigError("vault.transit_token is env:NAME or file:/path, never a token itself")


def _checked(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise KeyUnavailable("there is no token for the key server where vault.transit_token says")
    return token
