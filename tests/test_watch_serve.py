"""Watching, presets and shipped dictionaries in the real processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import test_sae
import tiny_model
from fortpoint import config
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import Description, Generate, Prefilled, Sampling, Token
from fortpoint.engine.worker import EngineSpec
from fortpoint.features import shipped
from fortpoint.types import Message, Role
from fortpoint.vault.model_folder import open_model
from served import MODEL, Served, make_home, run, start, stop, wait_until_ready
from test_engine_process import START_TIMEOUT_S, ready

pytestmark = pytest.mark.model

CHAT = "/v1/chat/completions"
ASK = {
    "model": MODEL.name,
    "messages": [{"role": "user", "content": "Where is the Golden Gate Bridge?"}],
    "temperature": 0,
    "max_tokens": 24,
}


def write_direction(home: Path, name: str, d_model: int, layer: int) -> None:
    folder = home / "features" / "directions"
    folder.mkdir(parents=True, exist_ok=True)
    card = {"model": "m", "hook": "resid_post", "layer": layer, "training_maximum": 1.0}
    (folder / f"{name}.json").write_text(json.dumps(card))
    vector = np.random.default_rng(5).standard_normal(d_model).astype(np.float32)
    vector /= np.linalg.norm(vector)
    save_file({"direction": vector}, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = make_home(tmp_path_factory.mktemp("watch") / "home")
    write_direction(home, "odd", 576, 15)
    os.environ["FORTPOINT_WATCH__TARGETS"] = "odd:0.05"
    try:
        made = wait_until_ready(start(home))
    finally:
        del os.environ["FORTPOINT_WATCH__TARGETS"]
    yield made
    if made.process.poll() is None:
        stop(made)


@pytest.fixture(scope="module")
def operator(watching: Served) -> dict[str, str]:
    made = run(watching.home, "key", "create", "--user", "grace", "--role", "operator", "--json")
    return {"Authorization": f"Bearer {json.loads(made.stdout)['key']}"}


def test_served_requests_alert_and_are_counted(watching: Served, operator: dict[str, str]) -> None:
    customer = {"Authorization": f"Bearer {watching.key}"}
    answer = httpx.post(f"{watching.address}{CHAT}", json=ASK, headers=customer, timeout=60).json()
    page = httpx.get(f"{watching.address}/api/alerts", headers=operator).json()
    own = [a for a in page["data"] if a["request_id"] == answer["fortpoint"]["request_id"]]
    assert own
    assert all(alert["target"] == "odd" and alert["value"] > 0.05 for alert in own)
    stats = httpx.get(f"{watching.address}/api/features/stats", headers=operator).json()
    (row,) = [r for r in stats["data"] if r["key_id"] == own[0]["key_id"]]
    # The question's own tokens but the first, and the answer's but the last.
    n_answer = answer["usage"]["completion_tokens"]
    assert n_answer < row["tokens"] < n_answer + answer["usage"]["prompt_tokens"]
    assert 0 < row["tokens_over"] <= row["tokens"]
    assert row["maximum"] >= max(alert["value"] for alert in own)
    metrics = httpx.get(f"{watching.address}/metrics").text
    assert 'fortpoint_watched_tokens_total{target="odd"}' in metrics
    assert "alert request=" in watching.text


def test_served_preset_steers_its_key_and_no_other(
    watching: Served, operator: dict[str, str]
) -> None:
    made = run(watching.home, "key", "create", "--user", "ada", "--role", "customer", "--json")
    key = json.loads(made.stdout)
    preset = {
        "name": "odd-60",
        "model": MODEL.name,
        "steer": [{"mode": "add", "target": "odd", "strength": 60}],
        "default_of": [key["key_id"]],
    }
    saved = httpx.post(f"{watching.address}/api/presets", json=preset, headers=operator)
    assert saved.status_code == 200, saved.text

    def said(headers: dict[str, str]) -> str:
        answer = httpx.post(f"{watching.address}{CHAT}", json=ASK, headers=headers, timeout=60)
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    steered, plain = said({"Authorization": f"Bearer {key['key']}"}), said(operator)
    assert "San Francisco" in plain
    assert steered != plain
    records = json.loads(run(watching.home, "audit", "show", "--limit", "2", "--json").stdout)
    insides = [record["entry"].get("inside") for record in records]
    used = [{"name": "odd-60", "sha256": saved.json()["sha256"]}]
    assert [inside.get("presets") for inside in insides if inside].count(used) == 1
    assert run(watching.home, "audit", "verify").returncode == 0


def test_server_that_could_not_watch_does_not_start(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    write_direction(home, "odd", 576, 15)
    done = run(home, "serve", "--port", "0", "--set", "watch.targets=ood")
    assert done.returncode == 1
    assert "watch.targets: there is no direction 'ood' (1 here: odd)" in done.stderr
    bad = run(home, "serve", "--port", "0", "--set", "watch.targets=odd:nan")
    assert (bad.returncode, "threshold of odd" in bad.stderr) == (1, True)


def _spec(folder: Path, targets: tuple[str, ...]) -> EngineSpec:
    return EngineSpec(
        config=config.Engine(threads=1, max_batch=4, dtype="float32"),
        model=str(folder / "tiny"),
        socket=str(folder / "e.sock"),
        probes=None,
        parent_pid=os.getpid(),
        features=str(folder / "features"),
        shipped=str(folder / "artefacts"),
        targets=targets,
    )


def _spawn(spec: EngineSpec) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "fortpoint.engine.worker"]
    return subprocess.Popen(
        [*command, msgspec.json.encode(spec).decode()], stderr=subprocess.PIPE, text=True
    )


def _ship(folder: Path, name: str, digest: str) -> None:
    made = {
        "W_enc": torch.randn(64, 32),
        "W_dec": torch.randn(32, 64),
        "b_enc": torch.zeros(32),
        "b_dec": torch.zeros(64),
    }
    place = test_sae.write(folder / "artefacts" / name, made, d_in=64, d_sae=32)
    (place / shipped.MODEL).write_text(json.dumps({"model": "tiny", "digest": digest}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_model.make(tmp_path / "tiny")
    _ship(tmp_path, "tiny-l1", open_model(tmp_path / "tiny").manifest.digest)
    _ship(tmp_path, "other-l1", "sha256:" + "00" * 32)
    return tmp_path


async def _ask(folder: Path) -> tuple[Description, Prefilled, list[Token]]:
    client = EngineClient(folder / "e.sock")
    try:
        description = await ready(client)
        messages = (Message(Role.USER, "hello"),)
        request = Generate("r", Sampling(4, 0.0), messages=messages, hold=False)
        async with await client.generate(request) as stream:
            events = [event async for event in stream]
    finally:
        await client.close()
    assert isinstance(events[0], Prefilled)
    return description, events[0], [event for event in events if isinstance(event, Token)]


def test_worker_loads_what_was_shipped_for_its_model_and_reads_it(place: Path) -> None:
    process = _spawn(_spec(place, ("tiny-l1/3",)))
    try:
        description, prefilled, tokens = asyncio.run(_ask(place))
    finally:
        process.kill()
        process.communicate()
    assert [card.name for card in description.dictionaries] == ["tiny-l1"]
    assert prefilled.reading is not None
    assert prefilled.reading.targets == ("tiny-l1/3",)
    assert len(prefilled.reading.target_values) == 4 * prefilled.reading.n_tokens
    assert all(t.reading is not None and len(t.reading.target_values) == 4 for t in tokens)


def test_worker_told_to_watch_another_model_s_feature_gives_up(place: Path) -> None:
    process = _spawn(_spec(place, ("other-l1/3",)))
    _, said = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 2
    assert "engine: watch.targets: there is no dictionary 'other-l1' (1 here: tiny-l1)" in said
