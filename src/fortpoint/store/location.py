"""Where the database is: SQLite in the home, or PostgreSQL by a reference to its address.

    location = locate(config)              # reads the address; ConfigError says what is wrong
    database = location.open()

The address is read once, before the gateway gives its files up. No error repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from fortpoint.config import Config
from fortpoint.errors import ConfigError
from fortpoint.store.address import read_address
from fortpoint.store.database import Database

_PORT = 5432
_NUMERIC = re.compile(r"[0-9.]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")


@dataclass(frozen=True)
class Location:
    """``url`` is None for SQLite in ``state``. Its password does not show itself."""

    state: Path
    url: URL | None = None

    def open(self) -> Database:
        if self.url is None:
            return Database.in_home(self.state)
        return Database(self.url)

    @property
    def port(self) -> int | None:
        """The TCP port that a connection goes to; None for a file or a Unix socket."""
        if self.url is None or not self.url.host:
            return None
        return self.url.port or _PORT

    @property
    def is_named(self) -> bool:
        """Whether a name has to be looked up, or a certificate verified."""
        host = (self.url and self.url.host) or ""
        return bool(host) and not _NUMERIC.fullmatch(host)


def locate(config: Config, environ: Mapping[str, str] | None = None) -> Location:
    """Read where ``store.url`` points. Raises ``ConfigError``."""
    address = read_address(config, environ)
    if address is None:
        return Location(config.state_path)
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise ConfigError("store.url: what is there is not a database's address") from None
    if url.get_backend_name() != "postgresql":
        raise ConfigError("store.url: the address is like postgresql://user:password@host/name")
    return Location(config.state_path, url)
