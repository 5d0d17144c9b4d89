"""What the commands of ``fortpoint vault`` share: the home's KEK, digests and record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import typer

from fortpoint.errors import ConfigError

if TYPE_CHECKING:
    from fortpoint.config import Config
    from fortpoint.vault.key_encryption import KeyEncryption


def key_encryption(config: Config) -> KeyEncryption:
    """What ``vault.key`` names. Raises ``ConfigError``."""
    from fortpoint.vault import key_sources

    if not config.vault.key:
        raise ConfigError(
            "vault.key is not set: name a passphrase file, the keyring or a key server, such as "
            "FORTPOINT_VAULT__KEY=passphrase-file:/path"
        )
    return key_sources.key_encryption(config.vault.key, config.vault.transit_token)


def digest_of(config: Config, name: str) -> str:
    """Of a sealed model. Raises ``ModelError`` where there is none."""
    from fortpoint.vault.sealed_folder import KeyRecord, sealed_path

    return KeyRecord.read(sealed_path(config.home_path, name)).model


def record(config: Config, surface: str, detail: str, digest: str) -> None:
    """Into the audit log. Raises ``AuditUnavailable``."""
    import asyncio

    from fortpoint.cli import record as audit
    from fortpoint.home import Home

    Home(config.home_path).make()

    async def append() -> None:
        async with audit.opened(config.state_path) as (_, log):
            await audit.append(log, surface, detail, model_digest=digest)

    asyncio.run(append())


def print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())
