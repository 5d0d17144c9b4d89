"""The house rules that a program can check."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
MAX_BINARY_BYTES = 15 * 1000 * 1000

# Joined here, so that this file does not name them either. A mirror or an index is the
# machine's setting; a name in the repository would go round it.
_REGISTRIES = tuple(
    re.compile(rb"\b" + re.escape(".".join(parts).encode()), re.IGNORECASE)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
        ("proxy", "golang", "org"),
        ("crates", "io"),
        ("conda", "anaconda", "org"),
    )
)
_DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _tracked() -> tuple[Path, ...]:
    files = (ROOT / name for name in _run("git", "ls-files", "-z").stdout.split("\0") if name)
    return tuple(file for file in files if file.is_file())


def _names(files) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


TRACKED = _tracked()
assert TRACKED, "this is not a git checkout"
RECORDS = tuple(sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")))


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" in opened.read(8192)


def test_no_file_names_a_package_registry():
    named = [
        file for file in TRACKED if any(host.search(file.read_bytes()) for host in _REGISTRIES)
    ]
    assert _names(named) == []


def test_registry_pattern_finds_a_host():
    sample = ("https://pypi" + ".org/simple").encode()
    assert any(host.search(sample) for host in _REGISTRIES)


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = [
        file
        for file in TRACKED
        if file.suffix == ".py" and {file.stem, file.parent.name} & _DRAWERS
    ]
    assert _names(drawers) == []


def test_no_module_is_longer_than_two_ideas():
    long = [
        file
        for file in TRACKED
        if file.suffix == ".py" and file.read_text(encoding="utf-8").count("\n") > MAX_LINES
    ]
    assert _names(long) == []


@pytest.mark.parametrize(
    "package", sorted((ROOT / "src").rglob("*.py")), ids=lambda file: file.name
)
def test_module_says_what_it_is_for(package):
    first = package.read_text(encoding="utf-8").lstrip()
    assert first.startswith('"""'), f"{package.relative_to(ROOT)} has no docstring"


def test_tracked_binaries_are_small_together():
    binaries = [file for file in TRACKED if _is_binary(file)]
    assert sum(file.stat().st_size for file in binaries) < MAX_BINARY_BYTES


def test_no_state_or_secret_is_tracked():
    forbidden = re.compile(r"(\.db(-wal|-shm)?|\.pem|\.ed25519|\.gguf|\.pkl|\.env)$|/\.test-home/")
    assert [name for name in _names(TRACKED) if forbidden.search(name)] == []


@pytest.mark.parametrize("record", RECORDS, ids=lambda file: file.stem)
def test_decision_has_its_sections_in_order(record):
    text = record.read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)", text, re.MULTILINE)
    wanted = ["Status", "Context", "Decision", "Rejected", "Consequences"]
    assert [section for section in sections if section in wanted] == wanted
    assert re.match(rf"# {record.name[:4]} \S", text), "the title starts with the number"


def test_decisions_are_numbered_without_gap_or_double():
    numbers = [int(record.name[:4]) for record in RECORDS]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        line
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for line in group
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}
    assert names - pinned == set()


def test_pins_have_no_local_version_and_no_path():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.!]+", pin)] == []


def test_importing_the_package_has_no_side_effect_of_weight():
    script = (
        "import sys, fortpoint, fortpoint.config, fortpoint.cli.main\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'litestar'} & set(sys.modules)\n"
        "sys.exit(f'imported at once: {sorted(heavy)}' if heavy else 0)"
    )
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
