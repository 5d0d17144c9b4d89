"""The engine serves a model of the fast path without the libraries of the slow one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny_model

SLOW = ("torch", "transformers")

# All that the worker's process does but to confine itself, which cannot be undone: it loads
# the model and what reads it, answers a client, and ends.
SERVE = """
import asyncio, json, os, signal, sys
from pathlib import Path

from fortpoint import config
from fortpoint.engine import worker
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import (
    Condition, Done, Generate, Prefilled, Sampling, ScoreText, Steer, Token, Watch
)
from fortpoint.types import Message, Role

place = Path(sys.argv[1])
at_import = sorted({name.partition(".")[0] for name in sys.modules})
spec = worker.EngineSpec(
    config=config.Engine(threads=1, max_batch=4),
    model=str(place / "tiny"),
    socket=str(place / "e.sock"),
    probes=None,
    parent_pid=os.getppid(),
    features=str(place / "features"),
    adapters=str(place / "adapters"),
)

async def main():
    serving = asyncio.create_task(worker._serve(spec, worker.bind(place / "e.sock")))
    await asyncio.sleep(0)
    client = EngineClient(place / "e.sock")
    request = Generate(
        "r",
        Sampling(8, 1.0, seed=1, logprobs=2, json_schema='{"enum": ["yes", "no"]}'),
        messages=(Message(Role.USER, "hello"),),
        hold=False,
        watch=Watch(("sae",), 4),
        steer=(
            Steer("clamp", "sae/1", 1.0, when=Condition("sae/2", 0.1)),
            Steer("add", "calm", 1.0),
        ),
    )
    async with await client.generate(request) as stream:
        events = [type(event) async for event in stream]
    assert events[0] is Prefilled and Token in events and events[-1] is Done, events
    await client.score(ScoreText("s", " there", prompt="hello"))
    await client.embed(["hello"])
    await client.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await serving == 0

asyncio.run(main())
served = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"imported": at_import, "served": served}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    tiny_model.make(folder / "tiny")
    _write_direction(folder / "features" / "directions")
    _write_dictionary(folder / "features" / "sae")
    return folder


def _write_direction(folder: Path) -> None:
    folder.mkdir(parents=True)
    card = {"model": "tiny", "hook": "resid_post", "layer": 1, "training_maximum": 4.0}
    (folder / "calm.json").write_text(json.dumps(card))
    save_file({"direction": torch.full((64,), 0.125).bfloat16()}, folder / "calm.safetensors")


def _write_dictionary(folder: Path) -> None:
    folder.mkdir(parents=True)
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    config = {"architecture": "standard", "d_in": 64, "d_sae": 32, "metadata": hook}
    (folder / "cfg.json").write_text(json.dumps(config))
    shapes = {"W_enc": (64, 32), "W_dec": (32, 64), "b_enc": (32,), "b_dec": (64,)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def test_engine_of_a_fast_model_never_imports_torch_or_transformers(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVE, str(place)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert not set(SLOW) & set(found["served"])
    assert not {*SLOW, "numpy", "numba"} & set(found["imported"])  # they would start threads
