"""``fortpoint steer``: what is asked of the engine, what is shown and recorded, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engine_socket import listening
from fakes import DICTIONARY, DIGEST, DIRECTION, FakeEngine, Script
from fortpoint.audit.entry import Inside
from fortpoint.cli.steer import Mode, parse_strengths, printable, steer
from fortpoint.cli.steer_target import named
from fortpoint.engine.protocol import Description, DictionaryCard, Generate, Steer
from fortpoint.errors import EngineUnavailable, InvalidRequest
from test_cli_key import recorded

PROMPT = "What do you like?"

app = typer.Typer()
app.command()(steer)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "h"))
    return tmp_path / "h"


@pytest.fixture
def engine(home: Path) -> Iterator[FakeEngine]:
    with listening(home, FakeEngine()) as engine:
        yield engine


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_steer_clamps_and_prints_the_answer(engine: FakeEngine) -> None:
    assert output(DIRECTION, "--strength", "6", PROMPT) == "Golden Gate Bridge\n"
    (request,) = engine.requests
    assert request.steer == (Steer("clamp", DIRECTION, 6.0),)
    assert request.messages is not None
    assert request.messages[0].content == PROMPT
    assert (request.hold, request.sampling.temperature) == (False, 0.0)


def test_steer_with_every_option_asks_for_it(engine: FakeEngine) -> None:
    target = f"{DICTIONARY}/7"
    more = ("--mode", "add", "--scope", "answer", "--max-tokens", "2", "--seed", "3")
    output(target, PROMPT, "--strength", "-2.5", "--temperature", "0.7", *more)
    (request,) = engine.requests
    assert request.steer == (Steer("add", target, -2.5, "answer"),)
    assert (request.sampling.max_tokens, request.sampling.seed) == (2, 3)


def test_steer_with_several_strengths_answers_each_under_its_name(engine: FakeEngine) -> None:
    printed = output(DIRECTION, PROMPT, "--strength", "2,4,6,4")
    assert [line for line in printed.splitlines() if line.endswith(":")] == [
        f"{DIRECTION} clamp {strength}:" for strength in (2, 4, 6)
    ]
    assert [request.steer[0].strength for request in engine.requests] == [2.0, 4.0, 6.0]


def test_steer_ablate_needs_no_strength(engine: FakeEngine) -> None:
    output(DIRECTION, PROMPT, "--mode", "ablate", "--strength", "1,2,3")
    assert [request.steer for request in engine.requests] == [(Steer("ablate", DIRECTION),)]


@pytest.mark.parametrize("strengths", ["6", "1,2,3,4"])
def test_steer_compare_shows_the_unsteered_answer_too(engine: FakeEngine, strengths: str) -> None:
    printed = output(DIRECTION, PROMPT, "--strength", strengths, "--compare")
    assert "unsteered" in printed
    assert f"{DIRECTION} clamp" in " ".join(printed.split())
    assert printed.count("Golden") == 1 + len(strengths.split(","))
    assert sum(not request.steer for request in engine.requests) == 1


def test_steer_json_is_one_object(engine: FakeEngine) -> None:
    told = json.loads(output(DIRECTION, PROMPT, "--strength", "2,4", "--compare", "--json"))
    assert (told["target"], told["mode"], told["digest"]) == (DIRECTION, "clamp", DIGEST)
    assert [answer["strength"] for answer in told["answers"]] == [None, 2.0, 4.0]
    assert {answer["text"] for answer in told["answers"]} == {"Golden Gate Bridge"}
    assert {answer["tokens"] for answer in told["answers"]} == {3}


def test_steer_is_recorded_before_it_is_answered(home: Path, engine: FakeEngine) -> None:
    output(DIRECTION, PROMPT, "--strength", "2,4", "--compare")
    (record,) = recorded(home / "state")
    entry = record.entry
    assert (entry.kind, entry.surface, entry.model_digest) == ("admin", "cli steer", DIGEST)
    assert entry.inside == Inside(steers=2)
    assert DIRECTION in (entry.detail or "")
    assert PROMPT not in repr(entry)
    assert entry.request_sha256 is not None


def test_steer_that_cannot_be_recorded_asks_nothing(home: Path, engine: FakeEngine) -> None:
    (home / "state").mkdir(parents=True)
    (home / "state" / "fortpoint.db").write_bytes(b"not a database" * 500)
    assert run(DIRECTION, PROMPT).exit_code == 1
    assert engine.requests == []


def test_steer_that_diverges_says_so_and_shows_the_others(engine: FakeEngine) -> None:
    result = run(DIRECTION, PROMPT, "--strength", "2,100")
    assert result.exit_code == 1
    assert "Golden Gate Bridge" in result.output
    assert "less strength" in result.output
    told = json.loads(run(DIRECTION, PROMPT, "--strength", "2,100", "--json").stdout)
    assert [answer["error"] is None for answer in told["answers"]] == [True, False]


def test_steer_without_a_server_says_what_to_do(home: Path) -> None:
    result = run(DIRECTION, PROMPT)
    assert isinstance(result.exception, EngineUnavailable)
    assert "fortpoint serve" in result.exception.message


@pytest.mark.parametrize(
    "strengths", ["nan", "inf", "-inf", "100.5", "-101", "six", "", "6,", "2;4", "1e999"]
)
def test_steer_with_a_strength_that_is_none_is_refused(engine: FakeEngine, strengths: str) -> None:
    result = run(DIRECTION, PROMPT, "--strength", strengths)
    assert isinstance(result.exception, InvalidRequest)
    assert "strength" in result.exception.message
    assert engine.requests == []


def test_strengths_have_a_limit() -> None:
    with pytest.raises(InvalidRequest, match="at most 16"):
        parse_strengths(",".join(map(str, range(17))), Mode.clamp)


@pytest.mark.parametrize("prompt", ["", "  \n", "a\x00b", "x" * 300_000])
def test_steer_with_a_prompt_that_is_none_is_refused(engine: FakeEngine, prompt: str) -> None:
    assert isinstance(run(DIRECTION, prompt).exception, InvalidRequest)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("golden-gat", "'golden-gate'"),
        ("Goldn Gate", "'golden-gate'"),
        ("l16/1", "'l15'"),
        ("l15/4608", "0 to 4607"),
        ("l15/-1", "0 to 4607"),
        ("l15/", "0 to 4607"),
        ("l15", "l15/0"),
        ("penguins on ice", "features describe"),
        (" ", "name a direction"),
        ("x" * 201, "name a direction"),
    ],
)
def test_steer_by_what_is_not_known_names_what_is_near(
    engine: FakeEngine, target: str, says: str
) -> None:
    result = run(target, PROMPT)
    assert isinstance(result.exception, InvalidRequest), result.output
    assert says in result.exception.message
    assert engine.requests == []


def test_direction_may_be_named_in_words(engine: FakeEngine) -> None:
    output("Golden Gate", PROMPT)
    assert engine.requests[0].steer[0].target == DIRECTION


def test_answer_s_control_characters_do_not_reach_the_terminal(home: Path) -> None:
    script = Script(tokens=("a\x1b[2J", "b\n", "\u202ec"))
    with listening(home, FakeEngine(script)):
        assert output(DIRECTION, PROMPT) == "a\ufffd[2Jb\n\ufffdc\n"
    assert printable("plain\ttext\n") == "plain\ttext\n"


def _description(*names: str) -> Description:
    cards = tuple(DictionaryCard(name, 1, 4) for name in names)
    return Description(
        "", "tiny", DIGEST, "llama", "float32", 64, 0, 1, 0, 0, {}, dictionaries=cards
    )


def test_words_find_the_feature_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = pytest.importorskip("fortpoint.features.understanding.index")
    search = pytest.importorskip("fortpoint.features.understanding.search")

    class Labels:
        """Stands in for an index of four features: only labels are looked at here."""

        def __init__(self, folder: Path) -> None:
            self.features = [_Labelled(f"{folder.name} {word}") for word in WORDS]

    class Looked:
        def __init__(self, labels: Labels) -> None:
            self.labels = labels

        def words(self, words: str, n: int) -> list[object]:
            wanted = words.split()
            found = [
                search.Hit(i, float(sum(word in feature.label for word in wanted)))
                for i, feature in enumerate(self.labels.features)
            ]
            return sorted((hit for hit in found if hit.score), key=lambda hit: -hit.score)[:n]

    monkeypatch.setattr(index.Index, "load", lambda folder, n_features: Labels(folder))
    monkeypatch.setattr(search, "Search", Looked)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = named("the golden gate bridge", _description("a", "b"), (tmp_path,))
    assert (found.target, found.label) == ("a/2", "a golden gate bridge")
    assert "b/2 (b golden gate bridge)" in found.others
    with pytest.raises(InvalidRequest, match=r"no feature is known by these.*nearest: [ab]/0"):
        named("penguin", _description("a", "b"), (tmp_path,))


WORDS = ("cats", "gate", "golden gate bridge", "numbers")


class _Labelled:
    def __init__(self, label: str) -> None:
        self.label = label


def test_request_carries_no_steer_where_the_model_is_asked_as_it_is(engine: FakeEngine) -> None:
    output(DIRECTION, PROMPT, "--compare")
    plain = [request for request in engine.requests if not request.steer]
    assert len(plain) == 1
    assert isinstance(plain[0], Generate)
