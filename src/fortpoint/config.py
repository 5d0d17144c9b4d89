"""One frozen configuration tree, parsed once and passed in.

Precedence: defaults < file (TOML, ``--config``) < environment < flags (``--set``).
An environment variable is ``FORTPOINT_<SECTION>__<KEY>`` (``FORTPOINT_SERVER__PORT=9000``);
``FORTPOINT_HOME`` and ``PORT`` are the two short names. An unknown key fails and names the
nearest known one. Every key is described here, and ``docs/configuration.md`` is made from it.

    config = load(flags=["server.port=9000"])
    config.server.port
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from fortpoint.errors import ConfigError

_PREFIX = "FORTPOINT_"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the tree. Fields carry their description in ``Meta``."""


class Server(_Section, frozen=True, kw_only=True):
    """The HTTP edge and its limits."""

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8080
    max_body_bytes: Annotated[
        int, Meta(ge=1024, description="Largest request body; beyond it 413.")
    ] = 4 * 1024 * 1024
    max_prompt_bytes: Annotated[
        int, Meta(ge=64, description="Largest sum of all message texts in UTF-8 bytes.")
    ] = 256 * 1024
    max_messages: Annotated[int, Meta(ge=1, description="Most messages in a request.")] = 256
    max_inputs: Annotated[
        int,
        Meta(ge=1, description="Most texts in one embeddings, completions or moderations call."),
    ] = 32
    max_n: Annotated[int, Meta(ge=1, le=64, description="Most answers to one prompt (`n`).")] = 8
    default_max_tokens: Annotated[
        int, Meta(ge=1, description="Answer length when the request names none.")
    ] = 512
    max_concurrent_per_key: Annotated[
        int, Meta(ge=1, description="Requests that one key may have running; beyond it 429.")
    ] = 64
    request_timeout_s: Annotated[
        float, Meta(gt=0, description="Longest time one request may take, in seconds.")
    ] = 300.0


class Engine(_Section, frozen=True, kw_only=True):
    """The process that holds the weights."""

    model: Annotated[
        str, Meta(description="Model to serve, as `fortpoint model list` names it.")
    ] = "smollm2-135m"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="Weights' precision; `auto` times both here and takes the faster."),
    ] = "auto"
    threads: Annotated[int, Meta(ge=0, description="Compute threads; 0 means one per core.")] = 0
    max_batch: Annotated[int, Meta(ge=1, le=256, description="Sequences decoded together.")] = 32
    max_context: Annotated[
        int,
        Meta(
            ge=64, description="Longest prompt plus answer in tokens (capped by model and memory)."
        ),
    ] = 4096
    kv_cache_mib: Annotated[
        int, Meta(ge=8, description="Memory for attention keys and values, in MiB.")
    ] = 192
    prefill_chunk: Annotated[
        int, Meta(ge=16, description="Prompt tokens computed between two decode steps.")
    ] = 256
    max_queue: Annotated[
        int, Meta(ge=0, description="Requests that may wait for a place; beyond it 503.")
    ] = 256
    sandbox: Annotated[
        Literal["require", "best-effort"],
        Meta(description="`require` refuses to start without Landlock and seccomp."),
    ] = "best-effort"


class Guard(_Section, frozen=True, kw_only=True):
    """Detectors and what happens when they fire."""

    enabled: Annotated[bool, Meta(description="Judge requests. Off leaves only the audit.")] = True
    probes: Annotated[
        bool, Meta(description="Read linear probes in the model beside the text models.")
    ] = True
    thresholds: Annotated[
        dict[str, Annotated[float, Meta(ge=0.0, le=1.0)]],
        Meta(
            description="Detector name to the score that blocks; the shipped card's where absent."
        ),
    ] = {}


class Audit(_Section, frozen=True, kw_only=True):
    """The record."""

    record_content: Annotated[
        bool,
        Meta(description="Also keep prompts and answers in the record, not only their hashes."),
    ] = False


class Config(_Section, frozen=True, kw_only=True):
    """The whole tree. ``home`` holds all state: database, models, keys of the log."""

    home: Annotated[str, Meta(description="Folder of all state.")] = "~/.fortpoint"
    server: Server = Server()
    engine: Engine = Engine()
    guard: Guard = Guard()
    audit: Audit = Audit()

    @property
    def home_path(self) -> Path:
        return Path(self.home).expanduser().absolute()


class Key(msgspec.Struct, frozen=True):
    """One documented key: dotted name, type, default, description."""

    name: str
    type: str
    default: str
    description: str


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> Config:
    """Parse the tree. ``flags`` are ``dotted.key=value``. Raises ``ConfigError``."""
    tree: dict[str, Any] = {}
    if file is not None:
        _merge(tree, _read_file(file), str(file))
    for name, value in _from_environ(os.environ if environ is None else environ):
        _put(tree, name, value, "environment")
    for flag in flags:
        name, separator, value = flag.partition("=")
        if not separator:
            raise ConfigError(f"--set {flag!r} is not of the form key=value")
        _put(tree, name.strip(), value, "--set")
    try:
        return msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}") from None


def keys() -> Iterator[Key]:
    """Every documented key, in the order of the tree."""
    yield from _keys_of(Config, "")


def _keys_of(section: type[_Section], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        name = prefix + field.name
        if isinstance(field.default, _Section):
            yield from _keys_of(type(field.default), name + ".")
            continue
        base, *extras = get_args(hints[field.name])
        default = field.default if field.default is not msgspec.NODEFAULT else {}
        description = next((m.description for m in extras if isinstance(m, Meta)), None)
        yield Key(name, getattr(base, "__name__", str(base)), str(default), description or "")


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if home := environ.get("FORTPOINT_HOME"):
        yield "home", home
    if port := environ.get("PORT"):
        yield "server.port", port
    for name, value in environ.items():
        if name.startswith(_PREFIX) and "__" in name:
            yield name.removeprefix(_PREFIX).lower().replace("__", "."), value


def _merge(tree: dict[str, Any], update: Mapping[str, Any], source: str, prefix: str = "") -> None:
    for name, value in update.items():
        dotted = prefix + name
        if isinstance(value, dict) and dotted in _sections():
            _merge(tree.setdefault(name, {}), value, source, dotted + ".")
        else:
            _check_known(dotted, source)
            tree[name] = value


def _put(tree: dict[str, Any], dotted: str, value: str, source: str) -> None:
    *path, last = dotted.split(".")
    if path[:2] == ["guard", "thresholds"]:
        _check_known("guard.thresholds", source)
    else:
        _check_known(dotted, source)
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _sections() -> set[str]:
    return {key.name.split(".")[0] for key in keys() if "." in key.name}


def _check_known(dotted: str, source: str) -> None:
    known = [key.name for key in keys()]
    if dotted in known:
        return
    near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{source}: unknown key {dotted!r}; did you mean {near!r}?")
