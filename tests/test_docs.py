"""The documents say what the program does: help texts, commands, settings, tree, links."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from fortpoint.cli.main import app
from fortpoint.config import load
from fortpoint.guard.policy_file import known_detectors, read_policy

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fortpoint"
COMMANDS = typer.main.get_command(app)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`((?:fortpoint|make) [^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
_TREE = re.compile(r"<!-- tree -->\n```text\n(.*?)```", re.DOTALL)
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_./]*|\.\.\.")


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update_docs = _script("update_docs")
DOCUMENTS = tuple(update_docs.documents())


def _run(*command: str) -> str:
    # MAKEFLAGS of the `make test` around us would reach a make that we start.
    environ = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    ).stdout


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _blocks() -> list:
    """Language and text of every fenced block."""
    return [
        pytest.param(language, text, id=f"{_name(file)}-{number}")
        for file in DOCUMENTS
        for number, (language, text) in enumerate(_FENCE.findall(file.read_text(encoding="utf-8")))
    ]


def _typed(console: str) -> Iterator[str]:
    """The command lines of a console block, continued ones joined."""
    for line in console.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line.removeprefix("$ ")


def _check(line: str) -> None:
    """Each command of ours in a shell line exists, with its options. Others are not looked at."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("|&;<>"):
            _check_command(words)
            words = []
        else:
            words.append(word)


def _check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        _check_targets(words[1:])
    elif program == "fortpoint":
        _check_fortpoint(words[1:])
    elif program in {"python", "python3"} and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), f"no script {words[1]}"


def _check_targets(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {word for word in words if not word.startswith("-") and "=" not in word}
    assert named <= targets, f"no target {named - targets}"


def _check_fortpoint(words: list[str]) -> None:
    command, path = COMMANDS, "fortpoint"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        names = words[0].split("|")  # "model pull|list" names two commands
        if _PLACEHOLDER.fullmatch(words[0]):
            return
        missing = [name for name in names if name not in command.commands]
        assert not missing, f"no command `{path} {missing[0]}`"
        command, path, words = command.commands[names[0]], f"{path} {names[0]}", words[1:]
    known = {"--help"}
    for parameter in command.params:
        known.update(parameter.opts + parameter.secondary_opts)
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("-") or option in known, f"no option {option} in `{path}`"


def test_documents_generated_parts_are_current():
    stale = [
        _name(file)
        for file, text in update_docs.current()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run `make docs`: {stale}"


def test_help_text_is_what_the_command_prints():
    environ = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "fortpoint.cli.main", "serve", "--help"]
    printed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    expected = update_docs.help_text("fortpoint serve")
    assert [line.split() for line in printed.stdout.strip().splitlines()[1:]] == [
        line.split() for line in expected.strip().splitlines()[1:]
    ]


@pytest.mark.parametrize(("language", "text"), _blocks())
def test_fenced_block_is_true(language, text, tmp_path):
    if language == "console":
        lines = list(_typed(text))
        assert lines, "a console block shows at least one `$ ` line"
        for line in lines:
            _check(line)
    elif language == "toml" and text.startswith("version = "):
        read_policy(text.encode(), "document", known_detectors())
    elif language == "toml":
        file = tmp_path / "fortpoint.toml"
        file.write_text(text, encoding="utf-8")
        load(file, environ={})
    elif language == "python":
        compile(text, "document", "exec")


@pytest.mark.parametrize("file", DOCUMENTS, ids=_name)
def test_inline_commands_each_exists(file):
    prose = _FENCE.sub("", file.read_text(encoding="utf-8"))
    for line in _SPAN.findall(prose):
        _check(line)


@pytest.mark.parametrize(
    "line", ["make nothing", "fortpoint key make", "fortpoint doctor --colour"]
)
def test_check_of_a_command_that_is_not_there_fails(line):
    with pytest.raises(AssertionError, match=r"no (target|command|option)"):
        _check(line)


@pytest.mark.parametrize("file", DOCUMENTS, ids=_name)
def test_links_each_file_exists(file):
    targets = _LINK.findall(file.read_text(encoding="utf-8"))
    assert [target for target in targets if not (file.parent / target).exists()] == []


def _tree() -> tuple[set[str], set[str]]:
    """What the README's tree names: at the top, and directly under src/fortpoint."""
    drawn = _TREE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert drawn, "the README has a tree"
    entries = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in drawn[1].splitlines()]
    assert all(len(entry) == 2 for entry in entries[1:]), "each room has a line that says what for"
    indented = {line.split()[0] for line in drawn[1].splitlines() if line.startswith("  ")}
    return {entry[0] for entry in entries} - indented, indented


def test_readme_tree_names_every_room_and_no_other():
    rooms = {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    modules = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert _tree()[1] == rooms | modules


def test_readme_tree_names_every_folder_of_the_repository():
    listed = _run("git", "ls-files").splitlines()
    folders = {f"{line.partition('/')[0]}/" for line in listed if "/" in line}
    folders = {folder for folder in folders if not folder.startswith(".")} - {"src/"}
    assert folders <= _tree()[0] - {"src/fortpoint/"}
    assert all((ROOT / name).is_dir() for name in _tree()[0])


def test_makefile_each_phony_target_with_a_line_is_listed():
    shown = _run("make", "--no-print-directory", "--silent")
    for target in ("serve", "test", "check", "format", "bench", "clean", "docs"):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE), target
