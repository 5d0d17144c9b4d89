"""Every setting with its limits, default and description, one class a section of the file.

``config.py`` reads them; ``docs/configuration.md`` is made from what stands here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the tree. Fields carry their description in ``Meta``."""


class Server(Section, frozen=True, kw_only=True):
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


class Engine(Section, frozen=True, kw_only=True):
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


class Upstream(Section, frozen=True, kw_only=True):
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


class Guard(Section, frozen=True, kw_only=True):
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


class Extraction(Section, frozen=True, kw_only=True):
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


class Watch(Section, frozen=True, kw_only=True):
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


class Store(Section, frozen=True, kw_only=True):
    """The database of keys, presets and the record."""

    url: Annotated[
        str,
        Meta(
            description="Where the address of a PostgreSQL database is, never the address itself, "
            "which holds a password: `env:NAME` or `file:/path`. SQLite in the home where empty."
        ),
    ] = ""


class Audit(Section, frozen=True, kw_only=True):
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


class Vault(Section, frozen=True, kw_only=True):
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
