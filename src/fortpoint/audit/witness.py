"""A witness remembers what a log was, and cosigns only what continues it.

    witness = Witness(state_file, log_key, cosigner)
    cosigned = witness.check(note, proof_of)      # a checkpoint the log handed out

1. The checkpoint is signed by the log's key.
2. It is not behind the one remembered, and the same where the sizes are.
3. A consistency proof leads from the one to the other.
4. The new one is on disk before the cosignature leaves (c2sp.org/tlog-witness).

Where 2 or 3 fails, both checkpoints and the proof are kept in a file as evidence: two texts
that one key signed and that cannot both be true. What is remembered stays as it was, so the
same log is refused again tomorrow.

Not seen here: what a log never showed this witness. A log may keep two histories apart for two
witnesses that never meet; whoever asks for cosignatures of both sees one of them missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fortpoint.audit.checkpoint import Checkpoint, VerifierKey
from fortpoint.audit.cosignature import Cosigner
from fortpoint.audit.proofs import check_consistency
from fortpoint.errors import VerificationError

_MAX_STATE_BYTES = 64 * 1024
_MAX_PATH = 2 * 64

ProofOf = Callable[[int, int], Sequence[bytes]]
"""The log's consistency proof from the first size to the second."""


class Inconsistent(VerificationError):
    """The log's history is not the one that was seen; ``evidence`` is the file that shows it."""

    def __init__(self, message: str, evidence: Path) -> None:
        super().__init__(message)
        self.evidence = evidence


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    log: str
    checkpoint: str


class Evidence(msgspec.Struct, frozen=True):
    """Two checkpoints by one key of which one cannot continue the other."""

    log: str
    reason: str
    seen: str
    shown: str
    proof: tuple[str, ...]
    time: int


class Witness:
    """One log's witness. Two processes must not share a state file."""

    def __init__(self, state: Path, log: VerifierKey, cosigner: Cosigner) -> None:
        self._state = state
        self._log = log
        self._cosigner = cosigner

    def seen(self) -> Checkpoint | None:
        """The newest checkpoint that was verified; None before the first.

        Raises ``VerificationError`` where the file is not this log's, or cannot be read: a
        witness that forgot would vouch for anything.
        """
        note = self._remembered()
        return None if note is None else self._log.open_checkpoint(note)

    def check(self, note: bytes, proof_of: ProofOf) -> bytes:
        """The note with our line under it. Raises ``Inconsistent``, ``VerificationError``."""
        shown = self._log.open_checkpoint(note)
        remembered = self._remembered()
        if remembered is not None:
            self._compare(remembered, shown, note, proof_of)
        _write(self._state, msgspec.json.encode(_State(str(self._log), note.decode())))
        return self._cosigner.cosign(note, int(time.time()))

    def _compare(
        self, remembered: bytes, shown: Checkpoint, note: bytes, proof_of: ProofOf
    ) -> None:
        seen = self._log.open_checkpoint(remembered)
        path: Sequence[bytes] = ()
        if 0 < seen.size < shown.size:  # a log that gives no proof is not yet one that lied
            path = proof_of(seen.size, shown.size)[: _MAX_PATH + 1]
        try:
            check_consistency(seen.size, seen.root_hash, shown.size, shown.root_hash, path)
        except VerificationError as error:
            reason = _reason(seen, shown, error.message)
            raise Inconsistent(reason, self._keep(reason, remembered, note, path)) from None

    def _remembered(self) -> bytes | None:
        try:
            with self._state.open("rb") as file:
                data = file.read(_MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise VerificationError(f"{self._state}: {error.strerror}") from None
        try:
            state = msgspec.json.decode(data, type=_State)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise VerificationError(f"{self._state} is not a witness's state") from None
        if state.log != str(self._log):
            raise VerificationError(f"{self._state} is the state of another log's witness")
        return state.checkpoint.encode()

    def _keep(self, reason: str, seen: bytes, shown: bytes, path: Sequence[bytes]) -> Path:
        """Named after what was shown, so that the same lie is kept once."""
        digest = hashlib.sha256(shown).hexdigest()[:16]
        file = self._state.with_name(f"{self._state.name}.evidence-{digest}.json")
        evidence = Evidence(
            str(self._log),
            reason,
            seen.decode(),
            shown.decode(errors="replace"),
            tuple(one.hex() for one in path),
            int(time.time()),
        )
        if not file.exists():
            text = json.dumps(msgspec.to_builtins(evidence), indent=2, ensure_ascii=False)
            _write(file, text.encode() + b"\n")
        return file


def _reason(seen: Checkpoint, shown: Checkpoint, why: str) -> str:
    if shown.size < seen.size:
        return f"the log has {shown.size} entries and had {seen.size}: entries were taken away"
    if shown.size == seen.size:
        return f"the log has {shown.size} entries as before, and not the same ones"
    return (
        f"the log of {shown.size} entries does not continue the one of {seen.size} that was "
        f"seen: its history was rewritten ({why})"
    )


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and on disk on return. Raises ``VerificationError``."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise VerificationError(f"{path} cannot be written: {error.strerror}") from None
