"""A whole log as one file of lines, for whoever verifies it elsewhere.

    {"entry":{...},"index":0,"nonce":"...","version":2}        an entry: its very bytes
    {"checkpoint":"fortpoint/...\\n256\\n...\\n"}                after the last entry it covers

It holds nothing that is kept beside the entries (``audit.entry.Content``). Nothing is verified
here: ``scripts/verify_audit.py log`` does that with the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec
from sqlalchemy import URL

from fortpoint.audit.snapshot import CheckpointRow, EntryRow, Snapshot, snapshot_of
from fortpoint.errors import InvalidRequest, VerificationError

_PROGRESS_EVERY = 1000
_ADVICE = "run `fortpoint audit verify`"


class Exported(msgspec.Struct, frozen=True):
    entries: int
    checkpoints: int


def export(
    where: Path | URL, file: Path, on_progress: Callable[[int, int], None] | None = None
) -> Exported:
    """Write the log to ``file``, whole or not at all.

    Raises ``InvalidRequest`` where there is such a file, ``VerificationError`` for a log that
    cannot be written in lines.
    """
    draft = file.with_name(f".{file.name}.draft")
    try:
        if file.exists():
            raise InvalidRequest(f"{file} is there already")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as out, snapshot_of(where) as snapshot:
            exported = _write(snapshot, out, on_progress)
            out.flush()
            os.fsync(descriptor)
        os.replace(draft, file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    return exported


def _write(
    snapshot: Snapshot, out: BinaryIO, on_progress: Callable[[int, int], None] | None
) -> Exported:
    total = snapshot.newest_size()
    checkpoints = snapshot.checkpoints()
    due = next(checkpoints, None)
    n_entries = n_checkpoints = 0
    for n_entries, row in enumerate(snapshot.entries(), start=1):
        out.write(_line_of(row, n_entries - 1))
        if due is not None and due.size == n_entries:
            out.write(_note_of(due))
            n_checkpoints += 1
            due = next(checkpoints, None)
        if on_progress is not None and n_entries % _PROGRESS_EVERY == 0:
            on_progress(n_entries, total)
    if due is not None:
        raise VerificationError(f"a checkpoint covers more entries than there are; {_ADVICE}")
    return Exported(n_entries, n_checkpoints)


def _line_of(row: EntryRow, index: int) -> bytes:
    if row.entry is None or b"\n" in row.entry:
        raise VerificationError(f"entry {index} was changed; {_ADVICE}")
    return row.entry + b"\n"


def _note_of(row: CheckpointRow) -> bytes:
    try:
        note = (row.note or b"").decode()
    except UnicodeDecodeError:
        raise VerificationError(f"a checkpoint was changed; {_ADVICE}") from None
    return json.dumps({"checkpoint": note}, separators=(",", ":")).encode() + b"\n"
