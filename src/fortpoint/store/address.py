"""The database server's address, read from where ``store.url`` says that it is.

``store.url`` is ``env:NAME`` or ``file:/path``, never the address itself, which holds a
password. Apart from ``store.location``, so that who starts processes does not load SQLAlchemy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fortpoint.config import Config
from fortpoint.errors import ConfigError

_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_FILE = "file:"
_MAX_ADDRESS_BYTES = 4096


def address_variable(config: Config) -> frozenset[str]:
    """The environment variable that holds the address."""
    match = _ENV.fullmatch(config.store.url)
    return frozenset() if match is None else frozenset({match[1]})


def read_address(config: Config, environ: Mapping[str, str] | None = None) -> str | None:
    """None where none is configured. Raises ``ConfigError``, which repeats nothing of it."""
    reference = config.store.url
    if not reference:
        return None
    if match := _ENV.fullmatch(reference):
        found = (os.environ if environ is None else environ).get(match[1], "").strip()
        if not found:
            raise ConfigError(f"store.url: the variable {match[1]} is not set")
        return found
    if not reference.startswith(_FILE):
        raise ConfigError("store.url is a reference, env:NAME or file:/path, not an address")
    try:
        with Path(reference.removeprefix(_FILE)).open("rb") as file:
            return file.read(_MAX_ADDRESS_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("store.url: the file that it names cannot be read") from None
