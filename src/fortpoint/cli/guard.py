"""``fortpoint guard``: judge a file of texts with the shipped detectors.

    fortpoint guard scan prompts.jsonl --out scores.jsonl

A row in is {"id"?, "text"} or {"id"?, "messages"}; a row out is {"id", "scores", "verdict",
"detectors"}, in order, one for each row in. With a running server the texts are read inside
the model; ``--text-only`` needs none. A row that cannot be judged has the verdict ``failed``
and its ``error``, and the command ends with exit code 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.cli import guard_account, guard_policy, guard_report, guard_train
from fortpoint.errors import FortPointError, InvalidRequest
from fortpoint.types import Message, Role

if TYPE_CHECKING:
    from fortpoint.engine.client import EngineClient
    from fortpoint.guard.guard import Guard

app = typer.Typer(help="Judge texts with the guard's detectors.", no_args_is_help=True)

_MAX_ROW_BYTES = 4 * 1024 * 1024


class Row(msgspec.Struct, frozen=True):
    """One line of the file: ``text`` is taken as one user message."""

    id: str | int | None = None
    text: str | None = None
    messages: tuple[Message, ...] | None = None


app.command("train")(guard_train.train)
app.command("report")(guard_report.report)
app.command("try")(guard_policy.try_policy)
app.add_typer(guard_policy.app, name="policy")
app.add_typer(guard_account.app, name="accounts")


@app.callback()
def guard() -> None:
    """Judge texts with the guard's detectors."""


@app.command()
def scan(
    file: Annotated[Path, typer.Argument(help="JSONL: {id?, text} or {id?, messages} a line.")],
    out: Annotated[Path, typer.Option("--out", help="Where the scores go, a line a row.")],
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Judge words alone; needs no running server.")
    ] = False,
) -> None:
    """Score every row of a file; say what would be blocked."""
    from fortpoint.config import load
    from fortpoint.guard.guard import Guard
    from fortpoint.home import Home

    config = load()
    judge = Guard.load(config.guard)
    socket = None if text_only else Home(config.home_path).engine_socket
    n_rows, n_blocked, n_failed = asyncio.run(_scan(judge, socket, file, out))
    typer.echo(f"{n_rows} rows: {n_blocked} blocked, {n_failed} failed; scores in {out}", err=True)
    if n_failed:
        raise typer.Exit(1)


async def _scan(judge: Guard, socket: Path | None, file: Path, out: Path) -> tuple[int, int, int]:
    from fortpoint.engine.client import EngineClient

    engine = None if socket is None else EngineClient(socket)
    counts = {"allow": 0, "block": 0, "failed": 0}
    try:
        with out.open("wb") as target:
            for index, line in enumerate(_lines(file)):
                answer = await _answer(judge, engine, line, index)
                counts[answer["verdict"]] += 1
                target.write(msgspec.json.encode(answer) + b"\n")
    except OSError as error:
        raise InvalidRequest(f"cannot read or write: {error.strerror}") from None
    finally:
        if engine is not None:
            await engine.close()
    return sum(counts.values()), counts["block"], counts["failed"]


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield line


async def _answer(
    judge: Guard, engine: EngineClient | None, line: bytes, index: int
) -> dict[str, Any]:
    identity: str | int = index
    try:
        row = _row(line)
        identity = index if row.id is None else row.id
        messages = row.messages or (Message(Role.USER, row.text or ""),)
        reading = None if engine is None else (await engine.scan(messages)).reading
        verdict = judge.judge(messages, reading)
    except FortPointError as error:
        return {"id": identity, "scores": {}, "verdict": "failed", "error": error.message}
    return {
        "id": identity,
        "scores": {name: score.score for name, score in verdict.strongest().items()},
        "verdict": verdict.action,
        "detectors": {
            name: {
                "threshold": score.threshold,
                "role": score.role,
                "flagged": score.flagged,
            }
            for name, score in verdict.strongest().items()
        },
    }


def _row(line: bytes) -> Row:
    """Raises ``InvalidRequest`` for a line that is not one row."""
    if len(line) > _MAX_ROW_BYTES:
        raise InvalidRequest("the row is too long")
    try:
        row = msgspec.json.decode(line, type=Row)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"not a row: {error}") from None
    if (row.text is None) == (row.messages is None):
        raise InvalidRequest("a row has exactly one of text and messages")
    if row.messages is not None and any(m.role is Role.TEMPLATE for m in row.messages):
        raise InvalidRequest("a message's role is system, user, assistant or tool")
    return row
