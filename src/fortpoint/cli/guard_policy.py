"""``fortpoint guard policy`` and ``guard try``: check a policy, and see what it would change.

    fortpoint guard policy check policy.toml
    fortpoint guard try policy.toml traffic.jsonl

``try`` takes rows as ``guard scan`` takes them ({id?, text} or {id?, messages}; judged here by
their text alone), rows that ``guard scan`` wrote, and entries as ``audit show --json`` prints
them. A row may say whose it was: key, user, lease, model, direction. Nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.cli.progress import Progress
from fortpoint.errors import InvalidRequest
from fortpoint.guard.policy import Context, Decision, Direction, decide
from fortpoint.types import Message, Role, Score, Verdict

if TYPE_CHECKING:
    from fortpoint.guard.guard import Guard
    from fortpoint.guard.policy_file import LoadedPolicy

app = typer.Typer(help="Check what the guard does about its scores.", no_args_is_help=True)

_MAX_ROW_BYTES = 4 * 1024 * 1024
_EXAMPLES = 5

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PolicyFile = Annotated[Path, typer.Argument(help="A policy (TOML).")]


class _Detected(msgspec.Struct, frozen=True):
    """What ``guard scan`` writes of a detector."""

    threshold: float
    role: Role = Role.USER
    flagged: bool = False


class _Entry(msgspec.Struct, frozen=True):
    """What is read of an audit entry."""

    request_id: str
    key_id: str | None = None
    user: str | None = None
    model: str | None = None
    verdict: Verdict | None = None


class _Row(msgspec.Struct, frozen=True):
    """One line of the file, in any of its forms."""

    id: str | int | None = None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    scores: dict[str, float] | None = None
    detectors: dict[str, _Detected] = {}
    entry: _Entry | None = None
    key: str | None = None
    user: str | None = None
    lease: str | None = None
    model: str | None = None
    direction: Direction = "input"


@dataclass
class _Changes:
    """What another policy changes; ``rules`` counts, by rule of the new one, what it decides
    otherwise than before, with ids of some rows."""

    n_rows: int = 0
    n_failed: int = 0
    n_changed: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    shadow: dict[str, int] = field(default_factory=dict)
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, row: str | int, before: Decision, after: Decision) -> None:
        self.n_rows += 1
        if after.shadow is not None:
            self.shadow[after.shadow] = self.shadow.get(after.shadow, 0) + 1
        if before.action == after.action:
            return
        self.n_changed += 1
        step = f"{before.action} -> {after.action}"
        self.actions[step] = self.actions.get(step, 0) + 1
        for rule in after.rules or ("no rule any more",):
            found = self.rules.setdefault(rule, {"rows": 0, "examples": []})
            found["rows"] += 1
            if len(found["examples"]) < _EXAMPLES:
                found["examples"].append(row)


@app.command()
def check(file: PolicyFile, as_json: Json = False) -> None:
    """Read a policy; say in which line it is wrong."""
    loaded = _load(file)
    rules = loaded.policy.rules
    if as_json:
        shown = {"version": loaded.version, "sha256": loaded.sha256, "rules": len(rules)}
        typer.echo(json.dumps(shown))
    else:
        typer.echo(f"{file}: version {loaded.version}, {len(rules)} rules, sha256 {loaded.sha256}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a policy."""
    from fortpoint.guard.policy_file import schema as described

    typer.echo(json.dumps(described(), indent=2))


@app.command()
def show(as_json: Json = False) -> None:
    """Print the policy that the configuration of this home names, or the shipped one."""
    from fortpoint.config import load

    loaded = current(load().guard.policy)
    if as_json:
        shown = {"source": loaded.source, "sha256": loaded.sha256, "text": loaded.text}
        typer.echo(json.dumps(shown))
    else:
        typer.echo(loaded.text, nl=False)


def try_policy(
    policy: PolicyFile,
    file: Annotated[Path, typer.Argument(help="Past traffic: JSONL, a row a line.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this policy instead of the current one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a policy would change on past traffic before it is live."""
    from fortpoint.config import load

    new = _load(policy)
    old = _load(against) if against is not None else current(load().guard.policy)
    changes = _replay(file, old, new)
    if as_json:
        shown = {"old": _named(old), "new": _named(new), **vars(changes)}
        typer.echo(msgspec.json.encode(shown).decode())
    else:
        _print(changes, old, new)
    if changes.n_failed:
        raise typer.Exit(1)


def _replay(file: Path, old: LoadedPolicy, new: LoadedPolicy) -> _Changes:
    from fortpoint.config import load
    from fortpoint.guard.guard import Guard

    guard, changes = Guard.load(load().guard), _Changes()
    try:
        n_bytes, done = max(1, file.stat().st_size), 0
        with Progress() as progress:
            for number, line in enumerate(_lines(file)):
                done += len(line)
                progress.update("replaying", min(done, n_bytes), n_bytes)
                try:
                    row, context, scores = _judged(line, number, guard)
                except InvalidRequest:
                    changes.n_failed += 1
                    continue
                before = decide(old.policy, scores, context)
                changes.note(row, before, decide(new.policy, scores, context))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    return changes


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        while line := lines.readline(_MAX_ROW_BYTES + 1):
            if line.strip():
                yield line


def _judged(line: bytes, number: int, guard: Guard) -> tuple[str | int, Context, tuple[Score, ...]]:
    """Raises ``InvalidRequest`` for a row that is none or cannot be judged."""
    if len(line) > _MAX_ROW_BYTES:
        raise InvalidRequest("the row is too long")
    try:
        row = msgspec.json.decode(line, type=_Row)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("not a row") from None
    name = number if row.id is None else row.id
    context = Context(row.direction, row.key, row.user, row.lease, row.model)
    if row.entry is not None:
        entry = row.entry
        context = Context(row.direction, entry.key_id, entry.user, row.lease, entry.model)
        return entry.request_id, context, () if entry.verdict is None else entry.verdict.scores
    if row.scores is not None:
        return name, context, _of_scan(row.scores, row.detectors)
    messages = row.messages or (Message(Role.USER, row.text or ""),)
    if (row.text is None) == (row.messages is None):
        raise InvalidRequest("a row has exactly one of text, messages and scores")
    verdict = guard.judge(messages, None)
    if verdict.action == "failed":
        raise InvalidRequest("the guard failed on this row")
    return name, context, verdict.scores


def _of_scan(scores: dict[str, float], detectors: dict[str, _Detected]) -> tuple[Score, ...]:
    """Raises ``InvalidRequest`` for a score of which it is not said what was found."""
    if not scores or set(scores) - set(detectors):
        raise InvalidRequest("a row of scores has what `guard scan` wrote of each detector")
    return tuple(
        Score(name, score, detectors[name].threshold, detectors[name].role, detectors[name].flagged)
        for name, score in scores.items()
    )


def _load(file: Path) -> LoadedPolicy:
    from fortpoint.guard.policy_file import known_detectors, load_policy

    return load_policy(file, known_detectors())


def current(file: str) -> LoadedPolicy:
    """The policy that the setting ``guard.policy`` names; where it is empty, the shipped one."""
    from fortpoint.guard.policy_file import shipped_policy

    return _load(Path(file).expanduser()) if file else shipped_policy()


def _named(loaded: LoadedPolicy) -> dict[str, str]:
    return {"source": loaded.source, "version": loaded.version, "sha256": loaded.sha256}


def _print(changes: _Changes, old: LoadedPolicy, new: LoadedPolicy) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    share = changes.n_changed / max(changes.n_rows, 1)
    typer.echo(
        f"{changes.n_rows} rows, {changes.n_changed} decided otherwise ({share:.2%}) by version "
        f"{new.version} than by {old.version}; {changes.n_failed} could not be judged"
    )
    for step, n in sorted(changes.actions.items()):
        typer.echo(f"  {step}: {n}")
    for action, n in sorted(changes.shadow.items()):
        typer.echo(f"  in shadow {action}: {n}")
    if changes.rules:
        table = Table("rule of the new policy", "rows", "for example")
        for rule, found in sorted(changes.rules.items()):
            ids = ", ".join(str(one) for one in found["examples"])
            table.add_row(rule, str(found["rows"]), Text(ids, overflow="fold"))
        Console().print(table)
