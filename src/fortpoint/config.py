"""One frozen configuration tree, parsed once and passed in.

Precedence: defaults < file (TOML, ``--config``) < environment < flags (``--set``).
An environment variable is ``FORTPOINT_<SECTION>__<KEY>`` (``FORTPOINT_SERVER__PORT=9000``);
``FORTPOINT_HOME`` and ``PORT`` are the two short names, and an empty one counts as absent.
In a variable and in a flag, a list's values are separated by commas.
An unknown key fails and names the nearest known one; a bad value fails and names where it
came from. Every key is described in ``settings.py``, and ``docs/configuration.md`` is made from it.

No key holds a secret: a message may therefore repeat the value that it refuses.

    config = load(flags=["server.port=9000"])
    config.server.port
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from fortpoint.errors import ConfigError
from fortpoint.settings import (
    Audit,
    Engine,
    Extraction,
    Guard,
    Section,
    Server,
    Store,
    Upstream,
    Vault,
    Watch,
)

__all__ = [
    "Audit",
    "Config",
    "Engine",
    "Extraction",
    "Guard",
    "Key",
    "Server",
    "Store",
    "Upstream",
    "Vault",
    "Watch",
    "keys",
    "load",
]

_PREFIX = "FORTPOINT_"
_SHORT = {"FORTPOINT_HOME": "home", "PORT": "server.port"}
_TABLES = ("guard.thresholds", "guard.answer_thresholds")


class Config(Section, frozen=True, kw_only=True):
    """The whole tree. ``home`` holds all state: database, models, keys of the log."""

    home: Annotated[str, Meta(min_length=1, description="Folder of all state.")] = "~/.fortpoint"
    server: Server = Server()
    engine: Engine = Engine()
    upstream: Upstream = Upstream()
    guard: Guard = Guard()
    extraction: Extraction = Extraction()
    watch: Watch = Watch()
    store: Store = Store()
    audit: Audit = Audit()
    vault: Vault = Vault()

    @property
    def home_path(self) -> Path:
        """``home`` as an absolute path. Raises ``ConfigError`` for an unknown ``~user``."""
        try:
            return Path(self.home).expanduser().absolute()
        except RuntimeError:
            raise ConfigError(f"home: there is no home directory for {self.home!r}") from None

    @property
    def state_path(self) -> Path:
        """What the gateway may write: the database, and the key that signs the record."""
        return self.home_path / "state"


class Key(msgspec.Struct, frozen=True):
    """One documented key: dotted name, type, limits, default (as TOML), description."""

    name: str
    type: str
    limits: str
    default: str
    description: str

    @property
    def variable(self) -> str:
        """Its environment variable. ``home`` and ``server.port`` have short names too."""
        return _PREFIX + self.name.upper().replace(".", "__")


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> Config:
    """Parse the tree. ``flags`` are ``dotted.key=value``. Raises ``ConfigError``.

    Each source is checked as it is laid over the ones before it, so that the error names it.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        update = _read_file(file)
        _check_file(update, file)
        tree = update
    for variable, name, value in _from_environ(os.environ if environ is None else environ):
        _put(tree, name, value, variable)
    for flag in flags:
        name, separator, value = flag.partition("=")
        if not separator:
            raise ConfigError(f"--set {flag!r} is not of the form key=value")
        name = name.strip()
        _check_known(name, "--set")
        _put(tree, name, value, f"--set {flag}")
    return _convert(tree, "defaults", strict=False)


def keys() -> Iterator[Key]:
    """Every documented key, in the order of the tree."""
    yield from _keys_of(Config, "")


def _keys_of(section: type[Section], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        name = prefix + field.name
        if isinstance(field.default, Section):
            yield from _keys_of(type(field.default), name + ".")
            continue
        base, *extras = get_args(hints[field.name])
        default = field.default if field.default is not msgspec.NODEFAULT else {}
        meta = next(extra for extra in extras if isinstance(extra, Meta))
        yield Key(
            name=name,
            type=_describe_type(base),
            limits=_describe_limits(base, meta),
            default=msgspec.json.encode(default).decode(),
            description=meta.description or "",
        )


def _describe_type(base: Any) -> str:
    if get_origin(base) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(base))
    if get_origin(base) is dict:
        return "table of float"
    if get_origin(base) is tuple:
        return f"list of {get_args(base)[0].__name__}"
    return str(base.__name__)


def _describe_limits(base: Any, meta: Meta) -> str:
    if get_origin(base) is dict:  # the limits are its values'
        meta = next(extra for extra in get_args(get_args(base)[1]) if isinstance(extra, Meta))
    bounds = ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))
    parts = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    if meta.min_length:
        parts.append("not empty")
    return ", ".join(parts)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


def _check_file(update: Mapping[str, Any], file: Path) -> None:
    """TOML has types, so none is guessed: ``port = "9000"`` is refused."""
    for name, value in update.items():
        if name in _sections() and isinstance(value, dict):
            for key in value:
                _check_known(f"{name}.{key}", str(file))
        else:
            _check_known(name, str(file))
    _convert(update, str(file), strict=True)


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Variable, dotted name, value: the short names first, so that the long ones win."""
    for variable, name in _SHORT.items():
        if value := environ.get(variable):
            yield variable, name, value
    for variable, value in environ.items():
        if not variable.startswith(_PREFIX) or variable in _SHORT:
            continue
        name = variable.removeprefix(_PREFIX).lower().replace("__", ".")
        if not _is_known(name):
            raise ConfigError(
                f"environment: unknown variable {variable}; did you mean {_nearest(name).variable}?"
            )
        yield variable, name, value


def _put(tree: dict[str, Any], dotted: str, value: str, source: str) -> None:
    """Set a known key and check the tree, so that an error names ``source``."""
    *path, last = dotted.split(".")
    leaf = tree
    for name in path:
        leaf = leaf.setdefault(name, {})
    leaf[last] = _split(value) if _is_list(dotted) else value
    _convert(tree, source, strict=False)


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",")] if value.strip() else []


def _convert(tree: Mapping[str, Any], source: str, *, strict: bool) -> Config:
    try:
        return msgspec.convert(tree, Config, strict=strict)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise ConfigError(f"{source}: {where.rstrip('`') or 'configuration'}: {what}") from None


def _sections() -> set[str]:
    return {key.name.split(".")[0] for key in keys() if "." in key.name}


def _is_known(dotted: str) -> bool:
    *path, detector = dotted.split(".")
    if ".".join(path) in _TABLES:  # their keys are the detectors', which the guard checks
        return bool(detector)
    return any(key.name == dotted for key in keys())


def _is_list(dotted: str) -> bool:
    return any(key.name == dotted and key.type.startswith("list") for key in keys())


def _nearest(dotted: str) -> Key:
    """The known key that looks most like this one; a bare last name counts too."""
    return max(keys(), key=lambda key: _likeness(dotted, key.name))


def _likeness(dotted: str, known: str) -> float:
    last = known.rpartition(".")[2]
    whole = difflib.SequenceMatcher(None, dotted, known).ratio()
    return max(whole, difflib.SequenceMatcher(None, dotted, last).ratio() - 0.01)


def _check_known(dotted: str, source: str) -> None:
    if _is_known(dotted):
        return
    if dotted in _sections():
        raise ConfigError(f"{source}: {dotted!r} is a section; set a key in it")
    raise ConfigError(f"{source}: unknown key {dotted!r}; did you mean {_nearest(dotted).name!r}?")
