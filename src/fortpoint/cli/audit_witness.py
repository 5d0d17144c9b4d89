"""``fortpoint audit witness``: watch a log from elsewhere, and cosign what continues it.

Exit code 3 says that the log's history is not the one that was seen; 1 that it could not be
asked, or answered nonsense, with ``--once`` or for a state that is not this log's.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from fortpoint.errors import ConfigError, NotFound, VerificationError

if TYPE_CHECKING:
    from fortpoint.audit.checkpoint import Checkpoint
    from fortpoint.audit.cosignature import Cosigner
    from fortpoint.audit.witness import Witness

INCONSISTENT = 3
_MAX_ANSWER_BYTES = 64 * 1024
_TIMEOUT_S = 10.0
_HASH_BYTES = 32
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def witness(
    log: Annotated[str, typer.Option("--log", help="Address of the gateway, https://...")],
    key: Annotated[Path, typer.Option("--key", help="The log's verifier key (audit.pub).")],
    state: Annotated[Path, typer.Option("--state", help="What is remembered of the log.")],
    signing_key: Annotated[
        Path | None,
        typer.Option("--signing-key", help="Our own key; made beside the state if missing."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Our name; from the key if absent.")
    ] = None,
    api_key: Annotated[
        str, typer.Option("--api-key", help="Where our key of the gateway is: env:NAME or file:/.")
    ] = "env:WITNESS_API_KEY",
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, max=86_400, help="Seconds between looks.")
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")] = False,
) -> None:
    """Watch a log from elsewhere: refuse a rewritten history, cosign what continues it.

    With exit code 3, both checkpoints lie beside the state as evidence.
    """
    from fortpoint.audit.checkpoint import VerifierKey
    from fortpoint.audit.witness import Inconsistent, Witness

    log_key = VerifierKey.parse(_text_of(key))
    client = LogClient(log, _secret(api_key))
    with _alone(state):
        own = _cosigner(signing_key or state.with_name(f"{state.name}.ed25519"), name)
        watching = Witness(state, log_key, own)
        watching.seen()  # a state that cannot be read stops here, not in the loop
        _say(as_json, f"Witness {own.key}", witness=str(own.key))
        while True:
            try:
                _look(client, watching, as_json)
            except Inconsistent as error:
                text = f"REFUSED: {error.message}\n  evidence  {error.evidence}"
                _say(as_json, text, refused=error.message, evidence=str(error.evidence))
                raise typer.Exit(INCONSISTENT) from None
            except VerificationError as error:  # nothing was vouched for
                if once:
                    raise
                _say(as_json, f"waiting: {error.message}", waiting=error.message)
            if once:
                return
            time.sleep(interval_s)


class LogUnreachable(VerificationError):
    """The log could not be asked: nothing is known of it, neither good nor bad."""


class LogClient:
    """Asks a gateway for checkpoints and proofs; every answer is limited and distrusted."""

    def __init__(self, url: str, api_key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise ConfigError("--log is an address like https://fortpoint.example")
        if parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise ConfigError("--log: http:// would send our key unencrypted; use https://")
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {api_key}", "Accept": "*/*"}

    def checkpoint(self) -> bytes:
        return self._ask("GET", "/api/audit/checkpoint")

    def consistency(self, old: int, new: int) -> list[bytes]:
        answer = self._ask("GET", f"/api/audit/proof/consistency?from={old}&to={new}")
        return _path_of(answer)

    def cosign(self, note: bytes) -> None:
        body = json.dumps({"note": note.decode()}).encode()
        self._ask("POST", "/api/audit/cosignature", body)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = self._connection()
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        try:
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            answer = response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise LogUnreachable(f"the log cannot be asked: {type(error).__name__}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise LogUnreachable(f"the log answered {response.status}: {_message_of(answer)}")
        if len(answer) > _MAX_ANSWER_BYTES:
            raise LogUnreachable("the log's answer is too long")
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=_TIMEOUT_S, context=self._tls
        )


def _look(client: LogClient, witness: Witness, as_json: bool) -> None:
    """One look: fetch, verify, remember, cosign."""
    before = witness.seen()
    cosigned = witness.check(client.checkpoint(), client.consistency)
    now = witness.seen()
    if now is None:
        raise VerificationError("the witness's state was taken away")
    kept = _hand_in(client, cosigned) if before != now else "seen before"
    text = f"{now.size} entries, root {now.root_hash.hex()[:16]}, {_since(before, now)}; {kept}"
    _say(as_json, text, size=now.size, root=now.root_hash.hex(), cosignature=kept)


def _hand_in(client: LogClient, cosigned: bytes) -> str:
    """A log that does not want our line is still watched."""
    try:
        client.cosign(cosigned)
    except LogUnreachable as error:
        return f"not kept by the log ({error.message})"
    return "cosigned"


def _since(before: Checkpoint | None, now: Checkpoint) -> str:
    if before is None:
        return "the first that was seen"
    return f"continues {before.size}"


def _cosigner(path: Path, name: str | None) -> Cosigner:
    import hashlib

    from fortpoint.audit.checkpoint import is_key_name
    from fortpoint.audit.cosignature import Cosigner
    from fortpoint.audit.signing_key import create_private, load_private

    try:
        if not path.exists():
            create_private(path)
        private = load_private(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    digest = hashlib.sha256(private.public_key().public_bytes_raw()).hexdigest()
    named = name or f"witness/{digest[:16]}"
    if not is_key_name(named):
        raise ConfigError("--name has neither spaces nor plus signs")
    return Cosigner(named, private)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two witnesses with one memory would each vouch for what the other saw."""
    import fcntl

    try:
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with state.with_name(f"{state.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise ConfigError(f"another witness uses {state}") from None


def _path_of(answer: bytes) -> list[bytes]:
    """A proof that cannot be read is one that proves nothing."""
    try:
        path = [bytes.fromhex(one) for one in json.loads(answer)["path"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VerificationError("the log's proof cannot be read") from None
    if any(len(one) != _HASH_BYTES for one in path):
        raise VerificationError("the log's proof cannot be read")
    return path


def _message_of(answer: bytes) -> str:
    try:
        text = str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "no reason given"
    return "".join(one if one.isprintable() else "?" for one in text[:200])


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode()
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise VerificationError(f"{path} is not a verifier key") from None


def _secret(reference: str) -> str:
    """Never on a command line, where every user of the machine sees it."""
    kind, _, rest = reference.partition(":")
    if kind == "env" and rest:
        found = os.environ.get(rest, "")
    elif kind == "file" and rest:
        found = _text_of(Path(rest)).strip()
    else:
        raise ConfigError("--api-key is a reference, env:NAME or file:/path, not a key")
    if not found or not found.isascii() or not found.isprintable():
        raise ConfigError(f"--api-key: there is no key in {reference}")
    return found


def _say(as_json: bool, text: str, **fields: object) -> None:
    print(json.dumps(fields) if as_json else text, flush=True, file=sys.stdout)
