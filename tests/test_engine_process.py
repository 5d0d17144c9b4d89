"""The real worker process, sandbox and all, over a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import peft_adapter
import tiny_model
from fortpoint import config, errors
from fortpoint.engine.architecture import Architecture
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import (
    MAX_FRAME_BYTES,
    Condition,
    Description,
    Done,
    Event,
    Generate,
    Prefilled,
    Sampling,
    ScoreText,
    Steer,
    Token,
)
from fortpoint.engine.worker import EngineSpec
from fortpoint.types import Message, Role

START_TIMEOUT_S = 60


def spawn(folder: Path, model: Path) -> subprocess.Popen[str]:
    spec = EngineSpec(
        config=config.Engine(threads=1, max_batch=4, dtype="float32"),
        model=str(model),
        socket=str(folder / "e.sock"),
        probes=None,
        parent_pid=os.getpid(),
        features=str(folder / "features"),
        adapters=str(folder / "adapters"),
    )
    command = [sys.executable, "-P", "-m", "fortpoint.engine.worker"]
    return subprocess.Popen(
        [*command, msgspec.json.encode(spec).decode()], stderr=subprocess.PIPE, text=True
    )


async def ready(client: EngineClient) -> Description:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return await client.describe()
        except errors.EngineUnavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    tiny_model.make(folder / "tiny")
    made = peft_adapter.tensors(Architecture.of(tiny_model.config()))
    peft_adapter.write(folder / "adapters" / "loud", made)
    directions = folder / "features" / "directions"
    directions.mkdir(parents=True)
    card = {"model": "tiny", "hook": "resid_post", "layer": 1, "training_maximum": 4.0}
    for name, changes in {"calm": {}, "far": {"layer": 9}}.items():
        (directions / f"{name}.json").write_text(json.dumps(card | changes))
        save_file({"direction": torch.full((64,), 0.125)}, directions / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def worker(place: Path) -> Iterator[subprocess.Popen[str]]:
    process = spawn(place, place / "tiny")
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
async def client(place: Path, worker: subprocess.Popen[str]) -> AsyncIterator[EngineClient]:
    made = EngineClient(place / "e.sock")
    await ready(made)
    yield made
    await made.close()


def _ask(request_id: str, max_tokens: int = 8, hold: bool = False) -> Generate:
    messages = (Message(Role.USER, "hello"),)
    return Generate(request_id, Sampling(max_tokens, 0.0), messages=messages, hold=hold)


async def _events(client: EngineClient, request: Generate) -> list[Event]:
    async with await client.generate(request) as stream:
        return [event async for event in stream]


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


async def test_worker_answers_many_at_once(client: EngineClient) -> None:
    answers = await asyncio.gather(*(_events(client, _ask(f"r{i}")) for i in range(20)))
    texts = {"".join(e.text for e in events if isinstance(e, Token)) for events in answers}
    assert len(texts) == 1
    assert all(isinstance(events[-1], Done) for events in answers)


async def test_worker_holds_until_it_may_proceed(client: EngineClient) -> None:
    async with await client.generate(_ask("held", hold=True)) as stream:
        assert isinstance(await anext(stream), Prefilled)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(stream)
        await stream.proceed()
        assert isinstance(await anext(stream), Token)


async def test_worker_stream_closed_early_frees_its_place(client: EngineClient) -> None:
    stream = await client.generate(_ask("left", max_tokens=3000))
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    async with asyncio.timeout(10):
        while (await client.describe()).running:
            await asyncio.sleep(0.01)


async def test_worker_connection_lost_frees_its_places(place: Path, client: EngineClient) -> None:
    other = EngineClient(place / "e.sock")
    await anext(await other.generate(_ask("left", max_tokens=3000)))
    await other.close()
    async with asyncio.timeout(10):
        while (await client.describe()).running:
            await asyncio.sleep(0.01)


async def test_worker_says_what_can_be_asked_of_it(client: EngineClient) -> None:
    description = await client.describe()
    assert description.adapters == ("loud",)
    assert description.directions == ("calm",)
    assert (description.running, description.waiting) == (0, 0)


async def test_worker_honours_what_is_asked_of_the_models_inside(client: EngineClient) -> None:
    plain = _ask("plain", max_tokens=20)
    asked = {
        "plain": plain,
        "adapted": msgspec.structs.replace(plain, id="adapted", adapter="loud"),
        "steered": msgspec.structs.replace(plain, id="steered", steer=(Steer("add", "calm", 3.0),)),
        "stopped": msgspec.structs.replace(
            plain, id="stopped", stop_when=(Condition("calm", -1.0),)
        ),
    }
    events = await asyncio.gather(*(_events(client, request) for request in asked.values()))
    texts = dict(zip(asked, map(_text, events), strict=True))
    assert len({texts["plain"], texts["adapted"], texts["steered"]}) == 3
    assert len([event for event in events[-1] if isinstance(event, Token)]) == 1
    assert texts["plain"].startswith(texts["stopped"])


async def test_worker_follows_a_schema_and_gives_logprobs(client: EngineClient) -> None:
    sampling = Sampling(50, 1.0, seed=1, logprobs=2, json_schema='{"enum": ["yes", "no"]}')
    request = msgspec.structs.replace(_ask("r"), sampling=sampling)
    events = await _events(client, request)
    assert json.loads(_text(events)) in ("yes", "no")
    tokens = [event for event in events if isinstance(event, Token)]
    assert all(len(token.top or ()) == 2 for token in tokens)


async def test_worker_scores_text(client: EngineClient) -> None:
    scored = await client.score(ScoreText("s", " there", prompt="hello", adapter="loud"))
    plain = await client.score(ScoreText("s", " there", prompt="hello"))
    assert scored.tokens == plain.tokens == tuple(" there")
    assert scored.logprobs != plain.logprobs


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"adapter": "quiet"}, "no adapter 'quiet'"),
        ({"steer": (Steer("add", "far", 1.0),)}, "could not be loaded"),
        ({"stop_when": (Condition("sae/0", 1.0),)}, "no dictionary"),
    ],
)
async def test_worker_asked_for_what_is_not_here_says_so(
    client: EngineClient, wish: dict[str, object], why: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=why):
        await _events(client, msgspec.structs.replace(_ask("r"), **wish))


async def test_worker_prompt_beyond_the_context_is_refused(client: EngineClient) -> None:
    with pytest.raises(errors.ContextLengthExceeded, match="shorten it"):
        await client.scan([Message(Role.USER, "x" * 10_000)])


async def test_worker_empty_text_is_refused(client: EngineClient) -> None:
    with pytest.raises(errors.InvalidRequest, match="no tokens"):
        await client.embed([""])


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x05junk!",
        b"\x00\x00\x00\xff",
    ],
)
async def test_worker_sent_junk_hangs_up_and_serves_on(
    place: Path, client: EngineClient, junk: bytes
) -> None:
    reader, writer = await asyncio.open_unix_connection(place / "e.sock")
    writer.write(junk)
    writer.write_eof()
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert isinstance((await _events(client, _ask("after")))[-1], Done)


async def test_worker_says_which_protections_are_on(client: EngineClient) -> None:
    protections = (await client.describe()).protections
    assert protections["no_core_dumps"]
    if sys.platform == "linux":
        assert protections["not_dumpable"]
        assert protections["no_network"]


async def test_worker_socket_is_its_owners_alone(place: Path, client: EngineClient) -> None:
    assert (place / "e.sock").stat().st_mode & 0o777 == 0o600


async def test_client_of_a_killed_engine_fails_and_finds_the_next_one(
    place: Path, tmp_path: Path
) -> None:
    process = spawn(tmp_path, place / "tiny")
    client = EngineClient(tmp_path / "e.sock")
    try:
        await ready(client)
        stream = await client.generate(_ask("r", max_tokens=3000))
        await anext(stream)
        process.kill()
        with pytest.raises(errors.EngineUnavailable, match="restarts by itself"):
            async for _ in stream:
                pass
        await stream.aclose()
        with pytest.raises(errors.EngineUnavailable):
            await client.describe()
        process.communicate()
        process = spawn(tmp_path, place / "tiny")
        await ready(client)
        assert isinstance((await _events(client, _ask("again")))[-1], Done)
    finally:
        await client.close()
        process.kill()
        process.communicate()


def test_worker_told_to_stop_ends_quietly(place: Path, tmp_path: Path) -> None:
    process = spawn(tmp_path, place / "tiny")

    async def serve_and_stop() -> None:
        client = EngineClient(tmp_path / "e.sock")
        await ready(client)
        await anext(await client.generate(_ask("running", max_tokens=3000)))
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 10)
        await client.close()

    asyncio.run(serve_and_stop())
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("damage", ["flip a weight", "remove the manifest"])
def test_worker_given_a_damaged_model_says_so_and_gives_up(tmp_path: Path, damage: str) -> None:
    model = tiny_model.make(tmp_path / "tiny")
    if damage == "flip a weight":
        weights = bytearray((model / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (model / "model.safetensors").write_bytes(weights)
    else:
        (model / "manifest.json").unlink()
    process = spawn(tmp_path, model)
    _, said = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 2
    assert said.startswith("engine: ")
    assert "Traceback" not in said
