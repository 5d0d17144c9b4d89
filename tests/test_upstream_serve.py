"""`fortpoint serve` before a live upstream: no weights, the same checks, walls and record."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from mock_upstream import MockUpstream, Streams, refuses, speaks, token
from served import Served, make_home, run, start, stop, wait_until_ready
from test_serve import ATTACK

pytestmark = pytest.mark.model

KEY = "upstream-key-that-nothing-shows"
ASK = [{"role": "user", "content": "What is the Golden Gate?"}]


@contextmanager
def live(mock: MockUpstream) -> Iterator[MockUpstream]:
    """``mock`` in a loop of its own, in a thread."""
    ready, stop_it = threading.Event(), threading.Event()

    async def serve() -> None:
        async with mock:
            ready.set()
            await asyncio.to_thread(stop_it.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield mock
    finally:
        stop_it.set()
        thread.join(5)


@contextmanager
def serving(
    home: Path, mock: MockUpstream, patch: pytest.MonkeyPatch, **settings: str
) -> Iterator[Served]:
    names = {
        "ENGINE__KIND": "upstream",
        "ENGINE__SANDBOX": "require" if sys.platform == "linux" else "best-effort",
        "UPSTREAM__URLS": mock.url,
        "UPSTREAM__MODEL": "m",
        "UPSTREAM__API_KEYS": "env:MODELS_KEY",
        "GUARD__PROBES": "false",
        **settings,
    }
    patch.setenv("MODELS_KEY", KEY)
    for name, value in names.items():
        patch.setenv(f"FORTPOINT_{name}", value)
    served = start(home)
    try:
        yield wait_until_ready(served)
    finally:
        if served.process.poll() is None:
            stop(served)


def test_serve_upstream_answers_whole_and_streamed_with_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        live(MockUpstream(speaks("The", " strait", prompt=11))) as mock,
        serving(tmp_path / "home", mock, monkeypatch) as served,
    ):
        client = served.client()
        whole = client.chat.completions.create(model="m", messages=ASK, max_tokens=9)
        stream = client.chat.completions.create(model="m", messages=ASK, max_tokens=9, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        names = [child.cmdline() for child in psutil.Process(served.process.pid).children()]
        verified = run(served.home, "audit", "verify")
    assert whole.choices[0].message.content == "".join(pieces) == "The strait"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 2)
    assert [one.body["max_tokens"] for one in mock.asked] == [9, 9]
    assert {one.headers["authorization"] for one in mock.asked} == {f"Bearer {KEY}"}
    assert verified.returncode == 0, verified.stderr
    # No weights were fetched and no process holds any.
    assert not any((tmp_path / "home" / "models").iterdir())
    assert not any("fortpoint.engine.worker" in name for name in names)
    assert f"upstream: {mock.url.split('/')[2]}" in served.text
    assert "observer: none" in served.text


def test_serve_upstream_shows_its_key_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        live(MockUpstream(refuses("401 Unauthorized", KEY.encode()))) as mock,
        serving(tmp_path / "home", mock, monkeypatch) as served,
    ):
        with pytest.raises(openai.APIStatusError) as failed:
            served.client().chat.completions.create(model="m", messages=ASK)
        gateway = served.child("gateway")
        arguments = " ".join(gateway.cmdline())
        metrics = httpx.get(f"{served.address}/metrics").text
        shown = run(served.home, "audit", "show", "--json").stdout
    assert mock.asked
    assert KEY not in "".join([arguments, metrics, shown, served.text, str(failed.value)])
    assert "env:MODELS_KEY" in arguments
    assert failed.value.status_code == 502


def test_serve_upstream_key_in_a_file_is_read_before_the_walls_go_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "elsewhere" / "key"
    file.parent.mkdir()
    file.write_text(KEY + "\n")
    settings = {"UPSTREAM__API_KEYS": f"file:{file}"}
    with (
        live(MockUpstream(speaks("x"))) as mock,
        serving(tmp_path / "home", mock, monkeypatch, **settings) as served,
    ):
        assert served.client().chat.completions.create(model="m", messages=ASK).choices
    assert mock.asked[0].headers["authorization"] == f"Bearer {KEY}"


def test_serve_upstream_guard_s_observer_reads_before_a_byte_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path / "home")
    with (
        live(MockUpstream(speaks("x"))) as mock,
        serving(home, mock, monkeypatch, GUARD__PROBES="true") as served,
    ):
        client = served.client()
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": ATTACK}]
            )
        assert mock.n_connections == 0
        assert client.chat.completions.create(model="m", messages=ASK).choices
        assert served.child("engine").is_running()
    assert refused.value.code == "content_filter"
    assert len(mock.asked) == 1


def test_serve_upstream_client_that_leaves_ends_the_upstream_s_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Streams([token("x")] * 2000, pause_s=0.01)
    with (
        live(MockUpstream(endless)) as mock,
        serving(tmp_path / "home", mock, monkeypatch) as served,
    ):
        stream = served.client().chat.completions.create(
            model="m", messages=ASK, max_tokens=5000, stream=True
        )
        # The first chunk only opens the answer, before anybody was asked.
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        stream.close()
        for _ in range(500):
            if mock.hung_up.is_set():
                break
            threading.Event().wait(0.01)
    assert mock.hung_up.is_set()
    assert len(endless.sent) < 2000


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"UPSTREAM__URLS": ""}, "upstream.urls"),
        ({"UPSTREAM__API_KEYS": "env:NOT_THERE"}, "NOT_THERE"),
        ({"UPSTREAM__API_KEYS": KEY}, "env:NAME or file:/path"),
        ({"UPSTREAM__URLS": "http://models.example/v1"}, "allow_plain_http"),
    ],
    ids=["no address", "no variable", "a key itself", "plain http"],
)
def test_serve_upstream_that_is_set_up_wrongly_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str
) -> None:
    names = {
        "ENGINE__KIND": "upstream",
        "UPSTREAM__URLS": "http://127.0.0.1:9/v1",
        "UPSTREAM__MODEL": "m",
        **settings,
    }
    for name, value in names.items():
        monkeypatch.setenv(f"FORTPOINT_{name}", value)
    done = run(tmp_path / "home", "serve", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert KEY not in done.stderr
