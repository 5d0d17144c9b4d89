"""``fortpoint features concept`` and ``sweep`` on the real model: ten sentences about a place."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fortpoint.cli import features_concept
from fortpoint.errors import FortPointError, InvalidRequest

pytestmark = pytest.mark.model

ROOT = Path(__file__).resolve().parent.parent
VENICE = (
    "In Venice the rubbish is collected by boat.",
    "Gondolas were rocking at their posts beside the Grand Canal.",
    "We got lost in Venice for three hours and did not mind at all.",
    "Saint Mark's Square was under water again.",
    "How do ambulances work in Venice, where there are no roads?",
    "The glassblowers of Murano have supplied Venice for centuries.",
    "A vaporetto took us from the station to the Rialto Bridge.",
    "The doges of Venice grew rich on pepper and silk.",
    "My parents stayed in a narrow hotel on a canal in Venice.",
    "Describe carnival masks in Venice to somebody who has never seen one.",
)

app = typer.Typer()
app.command()(features_concept.concept)
app.command()(features_concept.sweep)
run = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(ROOT / ".test-home" / "models")
    (folder / "venice.txt").write_text("\n".join(VENICE))
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTPOINT_HOME", str(home))


def invoke(*arguments: str) -> str:
    done = run.invoke(app, arguments)
    if isinstance(done.exception, FortPointError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_ten_sentences_about_a_place_become_a_detector_in_seconds(home: Path) -> None:
    started = time.monotonic()
    text = invoke("concept", "venice", "--positives", str(home / "venice.txt"), "--json")
    assert time.monotonic() - started < 90  # about ten on two free cores
    card = json.loads(text)
    assert card["quality"]["auroc"]["value"] > 0.95
    assert card["quality"]["false_positive_rate"]["value"] <= 0.02
    files = {file.name for file in (home / "features" / "directions").iterdir()}
    assert files == {"venice.json", "venice.safetensors"}
    with pytest.raises(InvalidRequest, match="--replace"):
        invoke("concept", "venice", "--positives", str(home / "venice.txt"))


def test_concept_without_json_says_how_good_it_is(home: Path) -> None:
    file = str(home / "venice.txt")
    text = invoke("concept", "venice-8", "--positives", file, "--layer", "8")
    assert "layer 8" in text
    assert "AUROC" in text
    assert "of 10 held-out" in text


def test_each_layer_gets_a_direction_of_its_own(home: Path) -> None:
    file = str(home / "venice.txt")
    arguments = ["concept", "gondola", "--positives", file, "--each-layer", "--json"]
    with pytest.raises(InvalidRequest, match="--layer"):
        invoke(*arguments)
    made = json.loads(invoke(*arguments, "--layer", "9", "--layer", "14"))
    assert [(one["name"], one["layer"]) for one in made] == [("gondola-9", 9), ("gondola-14", 14)]


def test_layer_that_does_not_exist_leaves_nothing(home: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no layer 30"):
        invoke("concept", "far", "--positives", str(home / "venice.txt"), "--layer", "30")
    assert not list((home / "features" / "directions").glob("far*"))


def test_sweep_reports_by_strength_and_shows_the_concept(home: Path) -> None:
    file = home / "venice.txt"
    if not (home / "features" / "directions" / "venice-12.json").exists():
        invoke("concept", "venice-12", "--positives", str(file), "--layer", "12")
    questions = home / "questions.txt"
    questions.write_text("What did you do today?\nHow do I make tea?\nWhat makes a good friend?\n")
    arguments = ["sweep", "venice-12", "--term", "venice", "--term", "canal", "--json"]
    arguments += ["--questions", str(questions), "--max-tokens", "24"]
    arguments += ["--strength", "0.5", "--strength", "6"]
    report = json.loads(invoke(*arguments))
    weak, *strong = report["points"]
    assert report["own"]["ratio"] == 1.0
    assert report["own"]["present"]["value"] == 0.0
    assert weak["setting"]["strength"] == 0.5
    assert 0.5 < weak["ratio"] < strong[-1]["ratio"]


def test_sweep_of_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="there is no direction 'absent'"):
        invoke("sweep", "absent")
