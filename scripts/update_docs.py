"""Write what the documents take from the program: settings, help texts, the list of ADRs.

    make docs        # or: .venv/bin/python scripts/update_docs.py

- docs/configuration.md, from ``fortpoint.config.keys()``
- docs/policy.schema.json, from ``fortpoint.guard.policy_file.schema()``
- in every document, the fenced block after ``<!-- help: fortpoint key create -->``
- in docs/adr/README.md, the list between ``<!-- records -->`` and ``<!-- end -->``

``tests/test_docs.py`` fails while any of them is not current.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from typer.testing import CliRunner

from fortpoint.cli.main import app
from fortpoint.config import Config, Key, keys
from fortpoint.guard.policy_file import schema

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
POLICY = ROOT / "docs" / "policy.schema.json"
RECORDS = ROOT / "docs" / "adr"

_HELP = re.compile(
    r"(?P<marker><!-- help: (?P<command>fortpoint[a-z -]*?) -->\n\n?)```\w*\n.*?```\n", re.DOTALL
)
_LIST = re.compile(r"(?<=<!-- records -->\n).*?(?=<!-- end -->)", re.DOTALL)
_PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": None}
_WIDTH = 78  # what the command line takes on any terminal of 80 columns or more

_INTRODUCTION = """\
# Configuration

<!-- Made by `make docs` from src/fortpoint/config.py. Do not edit. -->

Nothing needs to be set. Where something is, the precedence is: defaults < file
(`fortpoint serve --config fortpoint.toml`) < environment < flags (`--set server.port=9000`).

The variable of a key is `FORTPOINT_` and its name in capitals, with two underscores for the
dot: `engine.max_batch` is `FORTPOINT_ENGINE__MAX_BATCH`. `FORTPOINT_HOME` and `PORT` are the
short names of `home` and `server.port`; empty, they count as absent. An unknown key or
variable stops the start and names the nearest known one; a bad value stops it and names
where it came from. No key holds a secret.

```toml
[server]
port = 9000

[guard.thresholds]
jailbreak = 0.8
```
"""


def documents() -> Iterator[Path]:
    """Every document that belongs to the repository."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in ("docs", "src", "benchmarks", "training", "examples"):
        yield from sorted((ROOT / folder).rglob("*.md"))


def configuration() -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, members in groupby(keys(), key=lambda key: key.name.rpartition(".")[0]):
        parts.append(_section(section, list(members)))
    return "\n".join(parts)


def _section(name: str, members: list[Key]) -> str:
    owner = get_type_hints(Config)[name] if name else Config
    lines = [f"## {name or 'top level'}", "", (owner.__doc__ or "").replace("``", "`"), ""]
    lines += ["| key | default | accepts | meaning |", "|---|---|---|---|"]
    for key in members:
        accepts = f"{key.type}, {key.limits}" if key.limits else key.type
        lines.append(f"| `{key.name}` | `{key.default}` | {accepts} | {key.description} |")
    return "\n".join([*lines, ""])


def help_text(command: str) -> str:
    """What ``command --help`` prints on a terminal without colours."""
    program, *arguments = command.split()
    result = CliRunner().invoke(
        app, [*arguments, "--help"], prog_name=program, env=_PLAIN, terminal_width=_WIDTH
    )
    if result.exit_code != 0:
        raise SystemExit(f"{command} --help failed: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines()) + "\n"


def with_help(text: str) -> str:
    """A document with every help block as the program prints it now."""

    def block(match: re.Match[str]) -> str:
        return f"{match['marker']}```text\n{help_text(match['command'])}```\n"

    return _HELP.sub(block, text)


def with_records(text: str) -> str:
    """docs/adr/README.md with every decision record in its list."""
    return _LIST.sub("".join(map(_record, sorted(RECORDS.glob("[0-9]*.md")))), text)


def _record(file: Path) -> str:
    title = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()
    return f"- [{title}]({file.name})\n"


def current() -> Iterator[tuple[Path, str]]:
    """Each document and what it should say."""
    for file in documents():
        if file != CONFIGURATION:
            text = with_help(file.read_text(encoding="utf-8"))
            yield file, with_records(text) if file.parent == RECORDS else text
    yield CONFIGURATION, configuration()
    yield POLICY, json.dumps(schema(), indent=2) + "\n"


def main() -> int:
    for file, text in current():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {os.path.relpath(file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
