"""One frozen configuration tree, parsed once and passed in.

Precedence: defaults < file (TOML, ``--config``) < environment < flags (``--set``).
An environment variable is ``FORTPOINT_<SECTION>__<KEY>`` (``FORTPOINT_SERVER__PORT=9000``);
``FORTPOINT_HOME`` and ``PORT`` are the two short names, and an empty one counts as absent.
In a variable and in a flag, a list's values are separated by commas.
An unknown key fails and names the nearest known one; a bad value fails and names where it
came from. Every key is described here, and ``docs/configuration.md`` is made from it.

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

_PREFIX = "FORTPOINT_"
_SHORT = {"FORTPOINT_HOME": "home", "PORT": "server.port"}
_TABLES = ("guard.thresholds", "guard.answer_thresholds")


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the tree. Fields carry their description in ``Meta``."""


class Server(_Section, frozen=True, kw_only=True):
    """The HTTP edge and its limits."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
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
        float,
        Meta(gt=0, le=86_400, description="Longest time one request may take, in seconds."),
    ] = 300.0


class Engine(_Section, frozen=True, kw_only=True):
    """The process that holds the weights."""

    kind: Annotated[
        Literal["embedded", "upstream"],
        Meta(
            description="`embedded` answers with `engine.model`; `upstream` has the servers of "
            "`upstream.urls` answer, and `engine.model` only reads along for the guard's probes."
        ),
    ] = "embedded"
    model: Annotated[
        str, Meta(min_length=1, description="Model to serve, as `fortpoint model list` names it.")
    ] = "smollm2-135m"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8", "int4"],
        Meta(description="Weights' precision; `auto` takes the fastest here that rounds nothing."),
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="Compute threads; 0 means one per core.")
    ] = 0
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
        int,
        Meta(
            ge=16,
            description="Prompt tokens computed in a step; a quarter of them while answers go on.",
        ),
    ] = 256
    max_queue: Annotated[
        int, Meta(ge=0, description="Requests that may wait for a place; beyond it 503.")
    ] = 256
    sandbox: Annotated[
        Literal["require", "best-effort"],
        Meta(description="`require` refuses to start without Landlock and seccomp."),
    ] = "best-effort"


class Upstream(_Section, frozen=True, kw_only=True):
    """OpenAI-compatible servers that answer where `engine.kind` is `upstream`."""

    urls: Annotated[
        tuple[str, ...],
        Meta(
            description="Base addresses, the preferred first, each with its version path "
            "(`https://models.example/v1`)."
        ),
    ] = ()
    model: Annotated[
        str, Meta(description="The model's name at the upstreams, and the one that callers use.")
    ] = ""
    embedding_model: Annotated[
        str, Meta(description="The model for `/v1/embeddings`; `upstream.model` where empty.")
    ] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Where the upstreams' keys are, never a key itself: `env:NAME` or "
            "`file:/path`, one for all addresses or one for each (empty for none)."
        ),
    ] = ()
    allow_plain_http: Annotated[
        bool, Meta(description="Take `http://` addresses of other machines: unencrypted, unproven.")
    ] = False
    max_tokens_field: Annotated[
        Literal["max_tokens", "max_completion_tokens"],
        Meta(description="The upstreams' name for the longest answer."),
    ] = "max_tokens"
    more_sampling: Annotated[
        bool,
        Meta(
            description="The upstreams know `top_k`, `min_p` and `repetition_penalty`; else a "
            "request with one of them gets 400."
        ),
    ] = False
    connect_timeout_s: Annotated[
        float, Meta(gt=0, le=600, description="Longest wait for a connection, in seconds.")
    ] = 5.0
    first_token_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Longest wait for an answer's first token.")
    ] = 60.0
    idle_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Longest silence in the middle of an answer.")
    ] = 30.0
    total_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Longest time for one whole answer.")
    ] = 300.0
    max_attempts: Annotated[
        int,
        Meta(ge=1, le=16, description="Attempts for one request, over all upstreams together."),
    ] = 3
    backoff_s: Annotated[
        float,
        Meta(
            ge=0,
            le=60,
            description="Longest pause before asking the same upstreams again; it doubles with "
            "each round, and a random part of it is taken.",
        ),
    ] = 0.25
    breaker_failures: Annotated[
        int, Meta(ge=1, description="Failures in a row after which an upstream is left alone.")
    ] = 5
    breaker_pause_s: Annotated[
        float, Meta(gt=0, le=3600, description="How long, before one request tries it again.")
    ] = 10.0
    max_concurrent: Annotated[
        int, Meta(ge=1, description="Requests at the upstreams at once; beyond it 503.")
    ] = 512
    max_answer_bytes: Annotated[
        int, Meta(ge=1024, description="Most bytes taken from an upstream for one request.")
    ] = 16 * 1024 * 1024


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
    policy: Annotated[
        str,
        Meta(
            description="Policy file (TOML): what is done about which score, and about accounts; "
            "`fortpoint guard policy show` prints the shipped one, which holds where empty."
        ),
    ] = ""
    answers: Annotated[
        bool, Meta(description="Judge answers too, token by token, before they leave.")
    ] = True
    answer_thresholds: Annotated[
        dict[str, Annotated[float, Meta(ge=0.0, le=1.0)]],
        Meta(
            description="Detector name to the score that acts on an answer; the shipped one's "
            "where absent."
        ),
    ] = {}
    hold_back_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=512,
            description="Most tokens of an answer that wait to be judged; half of them always "
            "trail the newest.",
        ),
    ] = 16
    secrets: Annotated[
        Literal["flag", "redact", "block"],
        Meta(description="What is done about a secret (a key, a card number) in an answer."),
    ] = "redact"
    canaries: Annotated[
        tuple[str, ...],
        Meta(
            description="Where the texts are that must never come out, never such a text itself: "
            "`env:NAME` or `file:/path`. An answer that tells one is cut before it."
        ),
    ] = ()


class Extraction(_Section, frozen=True, kw_only=True):
    """What a caller may learn of the model beside its text, and who may change it inside."""

    logprobs: Annotated[
        bool,
        Meta(
            description="Send log-probabilities to whoever asks: at most 5 a token, rounded to "
            "two decimals. They make copying the model cheaper."
        ),
    ] = False
    features: Annotated[
        Literal["operator", "all"],
        Meta(description="Whose keys may see features of prompt and answer (`watch`)."),
    ] = "operator"
    steering: Annotated[
        Literal["operator", "all"],
        Meta(
            description="Whose keys may `steer` and use `stop_when`. Whoever may can turn the "
            "model's own restraint down, and learn of features when an answer stops."
        ),
    ] = "operator"


class Watch(_Section, frozen=True, kw_only=True):
    """What is read at every token of every request. A target that is not loaded stops the start."""

    targets: Annotated[
        tuple[str, ...],
        Meta(
            description="Directions and features (`<dictionary>/<index>`), at most 64. `name:0.8` "
            "alerts above 0.8 of its training maximum, a bare `name` above `watch.threshold`."
        ),
    ] = ()
    threshold: Annotated[
        float,
        Meta(gt=0, le=100, description="Alerts begin above this where none is named."),
    ] = 0.5


class Store(_Section, frozen=True, kw_only=True):
    """The database of keys, presets and the record."""

    url: Annotated[
        str,
        Meta(
            description="Where the address of a PostgreSQL database is, never the address itself, "
            "which holds a password: `env:NAME` or `file:/path`. SQLite in the home where empty."
        ),
    ] = ""


class Audit(_Section, frozen=True, kw_only=True):
    """The record."""

    record_content: Annotated[
        bool,
        Meta(
            description="Also keep prompts and answers beside the record, not only their hashes; "
            "`fortpoint audit erase` takes them out again."
        ),
    ] = False
    witnesses: Annotated[
        tuple[str, ...],
        Meta(
            description="Keys of witnesses (`name+id+base64`, as `fortpoint audit witness` prints "
            "its own) whose cosignatures the record takes and hands out."
        ),
    ] = ()


class Vault(_Section, frozen=True, kw_only=True):
    """Sealed weights, and the key that opens them."""

    key: Annotated[
        str,
        Meta(
            description="What wraps models' keys, never a key itself: `passphrase-file:/path`, "
            "`keyring`, or `transit:https://host:8200/v1/transit/keys/NAME` (HashiCorp Vault)."
        ),
    ] = ""
    transit_token: Annotated[
        str, Meta(description="Where the token for transit is: `env:NAME` or `file:/path`.")
    ] = "env:VAULT_TOKEN"  # noqa: S105 - where it is, not what
    plain_export: Annotated[
        bool, Meta(description="Let a sealed model's weights be written out, marked for a lease.")
    ] = False


class Config(_Section, frozen=True, kw_only=True):
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


def _keys_of(section: type[_Section], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        name = prefix + field.name
        if isinstance(field.default, _Section):
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
