"""``fortpoint preset``: what it keeps, what it records, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engine_socket import listening
from fakes import DICTIONARY, DIRECTION, FakeEngine
from fortpoint.audit.log import AuditLog
from fortpoint.cli import preset
from fortpoint.engine.protocol import Steer
from fortpoint.errors import AuditUnavailable, FortPointError, InvalidRequest, NotFound
from test_cli_key import make, recorded

SIX = ("save", "golden-gate-6", "--steer", f"{DIRECTION}=6")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "h"))
    return tmp_path / "h"


@pytest.fixture
def engine(home: Path) -> Iterator[FakeEngine]:
    with listening(home, FakeEngine()) as engine:
        yield engine


def run(*arguments: str) -> Result:
    return CliRunner().invoke(preset.app, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def listed() -> list[dict[str, object]]:
    cards: list[dict[str, object]] = json.loads(output("list", "--json"))
    return cards


def test_save_tries_the_steers_on_the_running_model_and_records_them(
    home: Path, engine: FakeEngine
) -> None:
    saved = json.loads(output(*SIX, "--steer", f"{DICTIONARY}/7=-2", "--scope", "answer", "--json"))
    assert (saved["saved"], saved["tried"]) == ("golden-gate-6", True)
    (tried,) = engine.scored
    assert tried.steer == (
        Steer("clamp", DIRECTION, 6.0, "answer"),
        Steer("clamp", f"{DICTIONARY}/7", -2.0, "answer"),
    )
    (record,) = recorded(home / "state")
    assert (record.entry.kind, record.entry.surface) == ("admin", "cli preset save")
    assert saved["sha256"] in (record.entry.detail or "")
    (card,) = listed()
    assert (card["sha256"], card["model"]) == (saved["sha256"], "smollm2-135m")


def test_save_without_a_server_says_that_it_was_not_tried(home: Path) -> None:
    result = run(*SIX)
    assert result.exit_code == 0
    assert "not tried" in result.output
    assert [card["name"] for card in listed()] == ["golden-gate-6"]


def test_save_reads_a_file_as_the_api_has_it(home: Path, tmp_path: Path) -> None:
    steers = [{"mode": "add", "target": "a/1", "strength": 2, "when": {"feature": "b", "above": 1}}]
    file = tmp_path / "steers.json"
    file.write_text(json.dumps(steers))
    output("save", "x", "--file", str(file))
    (card,) = listed()
    (steer,) = card["steer"]  # type: ignore[misc]
    assert steer["when"] == {"feature": "b", "above": 1.0}


def test_assign_gives_takes_and_says_whose_place(home: Path) -> None:
    key = make()["key_id"]
    output(*SIX)
    output("save", "calm", "--steer", "calm", "--mode", "ablate")
    output("assign", "golden-gate-6", "--key", key, "--always")
    assert "in the place of golden-gate-6" in output("assign", "calm", "--key", key, "--always")
    cards = {card["name"]: card for card in listed()}
    assert cards["calm"]["default_of"] == [key]
    assert cards["golden-gate-6"]["keys"] == [key]
    assert cards["golden-gate-6"]["default_of"] == []
    printed = output("list")
    assert key in printed
    assert "ablate calm" in " ".join(printed.split())
    output("assign", "calm", "--key", key, "--take")
    assert {card["name"]: card for card in listed()}["calm"]["default_of"] == []
    details = [record.entry.detail or "" for record in recorded(home / "state")]
    assert details[-1] == f"took preset calm from key {key}"
    assert details[-2].endswith("always, in the place of golden-gate-6")


def test_rm_forgets_but_not_what_a_key_has_always(home: Path) -> None:
    key = make()["key_id"]
    output(*SIX)
    output("assign", "golden-gate-6", "--key", key, "--always")
    assert isinstance(run("rm", "golden-gate-6").exception, InvalidRequest)
    output("assign", "golden-gate-6", "--key", key, "--take")
    assert output("rm", "golden-gate-6") == "Removed golden-gate-6.\n"
    assert listed() == []
    assert "fortpoint preset save" in output("list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("save", "x"),
        ("save", "x", "--steer", "a=1", "--file", "b"),
        ("save", "x", "--steer", "a"),
        ("save", "x", "--steer", "=1"),
        ("save", "x", "--steer", "a=b"),
        ("save", "x", "--steer", "a=nan"),
        ("save", "x", "--steer", "a=101"),
        ("save", "a b", "--steer", "a=1"),
        ("save", "x", "--file", "/nowhere.json"),
        ("save", "x", *["--steer", "a=1"] * 17),
    ],
)
def test_save_of_what_is_no_steering_is_refused(home: Path, arguments: tuple[str, ...]) -> None:
    assert isinstance(run(*arguments).exception, InvalidRequest)
    assert listed() == []


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "nonsense", '[{"mode":"add"}]', "[" * 3000, '[{"mod":1}]', " " * 70_000],
)
def test_save_of_a_file_that_holds_none_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "steers.json"
    file.write_text(text)
    assert isinstance(run("save", "x", "--file", str(file)).exception, InvalidRequest)


def test_save_by_what_the_running_model_does_not_have_is_refused(engine: FakeEngine) -> None:
    result = run("save", "x", "--steer", "golden=6")
    assert isinstance(result.exception, InvalidRequest)
    assert "'golden-gate'" in result.exception.message
    assert listed() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("rm", "nobody"),
        ("assign", "nobody", "--key", "a" * 12),
        ("assign", "golden-gate-6", "--key", "a" * 12),
        ("assign", "golden-gate-6", "--key", "nope", "--take"),
    ],
)
def test_command_on_what_is_not_there_is_not_found_and_not_recorded(
    home: Path, arguments: tuple[str, ...]
) -> None:
    output(*SIX)
    assert isinstance(run(*arguments).exception, NotFound)
    assert len(recorded(home / "state")) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("save", "golden-gate-6", "--steer", f"{DIRECTION}=2"),
        ("rm", "golden-gate-6"),
        ("assign", "golden-gate-6", "--key", "KEY", "--always"),
    ],
)
def test_change_that_cannot_be_recorded_is_undone(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    key = make()["key_id"]
    output(*SIX)
    before = listed()

    async def refuse(self: AuditLog, *_: object) -> None:
        raise AuditUnavailable("the record could not be written: the disk is full")

    monkeypatch.setattr(AuditLog, "append", refuse)
    result = run(*(key if one == "KEY" else one for one in arguments))
    assert isinstance(result.exception, AuditUnavailable)
    assert listed() == before


def test_always_and_take_exclude_each_other(home: Path) -> None:
    result = run("assign", "x", "--key", "a" * 12, "--always", "--take")
    assert isinstance(result.exception, FortPointError)
