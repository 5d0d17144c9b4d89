"""Where the upstream servers are and where their keys lie: parsed and checked before the start.

    targets = load_targets(config.upstream)       # reads the keys; ConfigError says what is wrong

A key is named, never written, in the configuration: ``env:NAME`` is a variable of the process,
``file:/path`` a file that holds it. It is read once, before the process gives its files up; a
new key needs a new start. No error here repeats a key or what may be one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from fortpoint.config import Upstream
from fortpoint.errors import ConfigError

_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"[!-~]{1,2048}")  # printable ASCII without spaces
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_KEY = re.compile(r"[!-~]{1,4096}")  # what a header may hold
_MAX_KEY_FILE_BYTES = 8192
_MAX_TARGETS = 16


class ApiKey:
    """A bearer token that does not show itself."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def header(self) -> str:
        return f"Bearer {self._value}"

    def __repr__(self) -> str:
        return "ApiKey(...)"


@dataclass(frozen=True)
class Target:
    """One upstream server. ``url`` ends without a slash; paths are put behind it."""

    url: str
    host: str
    port: int
    tls: bool
    api_key: ApiKey | None

    @property
    def name(self) -> str:
        """For logs and operators: no path, no key."""
        return f"{self.host}:{self.port}"

    @property
    def is_address(self) -> bool:
        """True when no name has to be looked up."""
        return _address(self.host) is not None


def load_targets(config: Upstream, environ: Mapping[str, str] | None = None) -> tuple[Target, ...]:
    """All upstreams with their keys, the preferred first. Raises ``ConfigError``."""
    if not config.urls or not config.model:
        raise ConfigError(
            "engine.kind=upstream needs upstream.urls and upstream.model; see docs/configuration.md"
        )
    if len(config.urls) > _MAX_TARGETS:
        raise ConfigError(f"upstream.urls: at most {_MAX_TARGETS} addresses")
    values = os.environ if environ is None else environ
    return tuple(
        _target(url, reference, config, values)
        for url, reference in zip(config.urls, _references(config), strict=True)
    )


def key_variables(config: Upstream) -> frozenset[str]:
    """The environment variables that hold keys."""
    return frozenset(match[1] for one in config.api_keys if (match := _ENV.fullmatch(one)))


def _references(config: Upstream) -> tuple[str, ...]:
    given, n_urls = config.api_keys, len(config.urls)
    if len(given) not in {0, 1, n_urls}:
        raise ConfigError("upstream.api_keys: give one for all addresses, or one for each")
    return given if len(given) == n_urls else (given or ("",)) * n_urls


def _target(url: str, reference: str, config: Upstream, environ: Mapping[str, str]) -> Target:
    parts = _split(url)
    host = parts.hostname or ""
    port = _port(parts)
    tls = parts.scheme == "https"
    if not (tls or config.allow_plain_http or _is_this_machine(host)):
        raise ConfigError(
            f"upstream.urls: http:// to {host} would send prompts and keys unencrypted; "
            "use https://, or set upstream.allow_plain_http=true"
        )
    return Target(url.rstrip("/"), host, port, tls, _key(reference, environ))


def _split(url: str) -> SplitResult:
    """Its parts. Not repeated in an error: it may hold a password."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        raise ConfigError("upstream.urls: this is not an address") from None
    if parts.scheme not in _PORTS or not host or not _URL.fullmatch(url):
        raise ConfigError("upstream.urls: an address is like https://models.example/v1")
    if "@" in parts.netloc:
        raise ConfigError(
            "upstream.urls: an address holds no user or password; see upstream.api_keys"
        )
    if "?" in url or "#" in url:
        raise ConfigError("upstream.urls: an address has neither a query nor a fragment")
    return parts


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        port = 0
    port = _PORTS[parts.scheme] if port is None else port
    if not port:
        raise ConfigError("upstream.urls: a port is 1 to 65535")
    return port


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _key(reference: str, environ: Mapping[str, str]) -> ApiKey | None:
    if not reference:
        return None
    if match := _ENV.fullmatch(reference):
        value, where = environ.get(match[1], ""), f"the variable {match[1]}"
    elif reference.startswith("file:/"):
        value, where = _read(Path(reference.removeprefix("file:"))), "the file that it names"
    else:
        raise ConfigError(
            "upstream.api_keys: each is env:NAME or file:/path; a key itself does not belong here"
        )
    if not _KEY.fullmatch(value):
        raise ConfigError(f"upstream.api_keys: {where} holds no key")
    return ApiKey(value)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES + 1)
        return content.decode("ascii").strip() if len(content) <= _MAX_KEY_FILE_BYTES else ""
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise ConfigError(f"upstream.api_keys: cannot read {path}: {error.strerror}") from None
