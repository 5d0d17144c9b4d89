"""Labels by a labelling model that is played, and over HTTP from a server that misbehaves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fortpoint.cli.features_label import Client, _Work
from fortpoint.errors import EngineError, InvalidRequest
from fortpoint.features.understanding import explaining, scoring
from fortpoint.features.understanding.describe import describe
from fortpoint.features.understanding.explaining import clean, explain, marked, verdict
from fortpoint.features.understanding.index import Context, Index
from fortpoint.features.understanding.rules import Table
from fortpoint.features.understanding.survey import Part, Survey, survey, unseen
from fortpoint.types import Message
from mock_upstream import MockUpstream
from planted_features import FRANCISCO, TEXTS, Planted, plant, settings


def quiet(stage: str, done: int, total: int) -> None:
    pass


class Played:
    """Names the marked token, and judges by whether it is marked."""

    def __init__(self, label: str = "the word Francisco", right: bool = True) -> None:
        self._label, self._right = label, right
        self.asked: list[Sequence[Message]] = []

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        self.asked.append(messages)
        content = messages[-1].content
        if "Active at:" not in content:
            return self._label
        lines = [line for line in content.splitlines() if ". " in line and line[0].isdigit()]
        said = [line.split(".")[0] for line in lines if ("« Francisco»" in line) == self._right]
        return ", ".join(said) or "none"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("harvest"))


@pytest.fixture(scope="module")
def seen(planted: Planted) -> Survey:
    return survey(planted.store, planted.dictionary, settings().survey, quiet)


@pytest.fixture(scope="module")
def index(planted: Planted) -> Index:
    return describe(planted.store, planted.dictionary, "sha256:1", planted.model, settings(), quiet)


@pytest.fixture(scope="module")
def part(planted: Planted) -> Part:
    return unseen(planted.store, planted.dictionary, 2, quiet)


def trial_of(part: Part, feature: int) -> scoring.Trial:
    from fortpoint.cli.features_label import _table

    table: Table = _table(part)
    found = scoring.trial(table, feature, np.empty(0, np.int64), scoring.Settings())
    assert found is not None
    return found


async def test_label_of_a_model_is_judged_by_the_same_model(index: Index, part: Part) -> None:
    played = Played()
    made = await explain(
        index.features[FRANCISCO], played, part.passages, trial_of(part, FRANCISCO), TEXTS
    )
    assert made.label == "the word Francisco"
    assert made.score is not None
    assert made.score.balanced == 1.0
    assert "« Francisco»" in played.asked[0][-1].content
    assert "' Bay'" in played.asked[0][-1].content


async def test_judge_that_is_always_wrong_scores_nothing(index: Index, part: Part) -> None:
    made = await explain(
        index.features[FRANCISCO],
        Played(right=False),
        part.passages,
        trial_of(part, FRANCISCO),
        TEXTS,
    )
    assert made.score is not None
    assert made.score.balanced == 0.0


async def test_judge_is_not_told_which_texts_are_active(index: Index, part: Part) -> None:
    played = Played()
    trial = trial_of(part, FRANCISCO)
    await explain(index.features[FRANCISCO], played, part.passages, trial, TEXTS)
    lines = [line for line in played.asked[1][-1].content.splitlines() if "«" in line]
    active = ["« Francisco»" in line for line in lines]
    assert len(lines) == 2 * explaining.JUDGED_EACH
    assert sum(active) == explaining.JUDGED_EACH
    assert active != sorted(active)
    assert active != sorted(active, reverse=True)
    assert all(line.count("«") == 1 for line in lines)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("San Francisco", "San Francisco"),
        ('\n  "The bay"  \nbecause ...', "The bay"),
        ("Label: **bridges**", "bridges"),
        ("\x1b[2J<b>red</b>", "·[2J<b>red</b>"),
        ("x" * 9000, "x" * explaining.MAX_LABEL_CHARS),
    ],
)
def test_answer_becomes_one_clean_line(answer: str, label: str) -> None:
    assert clean(answer) == label


@pytest.mark.parametrize("answer", ["", "   \n\t", "''", "**"])
def test_answer_without_a_label_is_an_error(answer: str) -> None:
    with pytest.raises(EngineError, match="without a label"):
        clean(answer)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("1, 3, 5", [1, 3, 5]),
        ("none", []),
        ("Numbers 2 and 4.", [2, 4]),
        ("0, 17, 9999, 3, 3", [3]),
        ("٣", []),
        ("1" * 100_000, []),
    ],
)
def test_verdict_takes_only_numbers_that_were_asked_about(answer: str, numbers: list[int]) -> None:
    assert verdict(answer, 16) == numbers


def test_marked_context_joins_neighbours_and_shows_no_control_characters() -> None:
    context = Context((" San", " Fran", "cisco", "\n", "\x1b"), (0, 80, 90, 10, 0), 2, 0)
    assert marked(context) == " San« Francisco»⏎·"


def says(text: str, status: str = "200 OK"):
    async def behave(asked, writer) -> None:
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        await send(writer, body.encode(), status)

    return behave


def raw(body: bytes, status: str = "200 OK"):
    async def behave(asked, writer) -> None:
        await send(writer, body, status)

    return behave


async def send(writer, body: bytes, status: str) -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    await writer.drain()


ASK = (Message("user", "hello"),)  # type: ignore[arg-type]


async def test_client_sends_the_key_and_reads_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_KEY", "a-key-of-the-test")
    async with MockUpstream(says("a bridge")) as mock:
        client = Client.of(mock.url, "m", "env:LABEL_KEY", 5.0, False)
        async with client:
            assert await client.answer(ASK, 20) == "a bridge"
            assert await client.answer(ASK, 20) == "a bridge"
    asked = mock.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == "Bearer a-key-of-the-test"
    assert asked.body["messages"] == [{"role": "user", "content": "hello"}]
    assert (asked.body["max_tokens"], asked.body["temperature"]) == (20, 0)


@pytest.mark.parametrize(
    "behaviour",
    [
        raw(b"not json"),
        raw(b'{"choices": []}'),
        raw(b"{}"),
        raw(b"[" * 50_000),
        raw(b'{"choices": [{"message": {"content": 7}}]}'),
        raw(b"x" * 400_000),
        raw(b"secret-of-the-server", "401 Unauthorized"),
        raw(b"", "302 Found"),
        raw(b"", "400 Bad Request"),
    ],
)
async def test_client_of_a_server_that_misbehaves_says_so(
    behaviour,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fortpoint.cli.features_label._ATTEMPTS", 1)
    async with MockUpstream(behaviour) as mock:
        client = Client.of(mock.url, "m", "", 5.0, False)
        async with client:
            with pytest.raises(EngineError) as caught:
                await client.answer(ASK, 20)
    assert "secret-of-the-server" not in caught.value.message


async def test_client_asks_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fortpoint.cli.features_label._LONGEST_PAUSE_S", 0.01)
    async with MockUpstream(raw(b"", "503 Busy"), says("a bridge")) as mock:
        client = Client.of(mock.url, "m", "", 5.0, False)
        async with client:
            assert await client.answer(ASK, 20) == "a bridge"
    assert len(mock.asked) == 2


@pytest.mark.parametrize(
    ("url", "model", "key", "says_what"),
    [
        ("", "m", "", "--with"),
        ("http://127.0.0.1:1/v1", "", "", "--model"),
        ("ftp://here/v1", "m", "", "an address is like"),
        ("http://models.example/v1", "m", "", "--allow-plain-http"),
        ("https://user:pw@models.example/v1", "m", "", "no user or password"),
        ("https://models.example/v1", "m", "sk-a-key-itself", "env:NAME or file:/path"),
        ("https://models.example/v1", "m", "env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE"),
        ("https://models.example/v1", "m", "file:/no/such/file", "cannot read"),
    ],
)
def test_address_or_key_that_is_none_is_refused(
    url: str, model: str, key: str, says_what: str
) -> None:
    with pytest.raises(InvalidRequest, match=says_what) as caught:
        Client.of(url, model, key, 5.0, False)
    assert "sk-a-key-itself" not in caught.value.message
    assert "pw" not in caught.value.message


class Broken:
    async def __aenter__(self) -> Broken:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        raise EngineError("the labelling model is away")


class Context_(Played):
    async def __aenter__(self) -> Context_:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_work_keeps_what_is_better_and_saves_it(
    index: Index, part: Part, tmp_path: Path
) -> None:
    worse = index.features[FRANCISCO]
    from msgspec.structs import replace

    features = list(index.features)
    features[FRANCISCO] = replace(worse, label="nonsense", label_score=0.2)
    work = _Work(Index(index.header, tuple(features)), tmp_path, part, TEXTS, "played", False)
    wanted = [f for f in work.wanted(0) if f.index == FRANCISCO]
    await work.run(Context_(), wanted, 2, quiet)  # type: ignore[arg-type]
    kept = Index.load(tmp_path).features[FRANCISCO]
    assert (kept.label, kept.label_score, kept.labeller) == ("the word Francisco", 1.0, "played")
    assert (work.n_kept, work.n_failed) == (1, 0)
    again = _Work(Index.load(tmp_path), tmp_path, part, TEXTS, "played", False)
    assert FRANCISCO not in {f.index for f in again.wanted(0)}


async def test_work_with_a_label_that_is_worse_keeps_the_old_one(
    index: Index, part: Part, tmp_path: Path
) -> None:
    work = _Work(index, tmp_path, part, TEXTS, "played", False)
    wanted = [f for f in work.wanted(0) if f.index == FRANCISCO]
    await work.run(Context_(right=False), wanted, 1, quiet)  # type: ignore[arg-type]
    assert work.n_kept == 0
    assert os.listdir(tmp_path) == []


async def test_work_gives_up_on_a_server_that_is_away(
    index: Index, part: Part, tmp_path: Path
) -> None:
    work = _Work(index, tmp_path, part, TEXTS, "played", False)
    with pytest.raises(EngineError, match="is away"):
        await work.run(Broken(), work.wanted(0), 1, quiet)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
