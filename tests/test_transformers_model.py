"""Architectures outside the family answer as transformers itself does, seen inside and changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_model
from fortpoint.config import Engine
from fortpoint.engine.client import EngineClient
from fortpoint.engine.loading import load_adapters, load_model
from fortpoint.engine.model import Model, Span, Step
from fortpoint.engine.protocol import Done, Generate, Sampling
from fortpoint.engine.transformers_model import TransformersModel
from fortpoint.errors import ModelError
from fortpoint.types import Message, Role
from test_engine_process import ready, spawn

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 128},
    "gpt_neox": SIZES | {"intermediate_size": 64, "max_position_embeddings": 128},
    "gemma2": SIZES
    | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "phi": SIZES | {"intermediate_size": 64, "max_position_embeddings": 128},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mixtral": SIZES
    | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8},
}
TOKENS = [(7 * i + 3) % 97 for i in range(20)]
KV_BYTES = 1 << 20


def _make(folder: Path, kind: str, **changes: Any) -> Path:
    config = AutoConfig.for_model(kind, **KINDS[kind] | changes)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weights in model.parameters():  # far enough from nought that every part matters
            weights.add_(torch.randn_like(weights) * 0.1)
    model.save_pretrained(folder)
    return folder


def _load(folder: Path, dtype: str = "float32") -> TransformersModel:
    return TransformersModel.load(folder, dtype, 64, KV_BYTES, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformersModel:
    return _load(folder)


def _whole(model: Model, tokens: list[int], **step: Any) -> Any:
    cache = model.new_cache()
    assert cache.reserve(len(tokens))
    return model.forward(Step(tokens, [Span(cache, 0, len(tokens))], **step))


@torch.inference_mode()
def test_forward_equals_transformers_inside_and_out(folder: Path, model: TransformersModel) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = theirs(torch.tensor([TOKENS]), output_hidden_states=True)
    rows = [0, 7, 19]
    got = _whole(model, TOKENS, logit_rows=rows, tap_layers=(0, 1, 2))
    np.testing.assert_allclose(got.logits, expected.logits[0, rows].numpy(), atol=1e-5)
    for layer in (0, 1):
        np.testing.assert_allclose(
            got.seen[layer], expected.hidden_states[layer + 1][0].numpy(), atol=1e-5
        )
    np.testing.assert_array_equal(got.seen[2], got.residual)
    # transformers' last hidden state is after the final norm
    np.testing.assert_allclose(
        model.normed(got.residual), expected.hidden_states[3][0].numpy(), atol=1e-5
    )
    assert (model.n_layers, model.d_model, model.vocab_size) == (3, 32, 97)
    assert model.max_context == 64
    assert isinstance(model, Model)


def test_forward_in_chunks_beside_another_equals_forward_at_once(model: TransformersModel) -> None:
    expected = _whole(model, TOKENS, logit_rows=range(20), tap_layers=(1,))
    cache, neighbour = model.new_cache(), model.new_cache()
    assert cache.reserve(20)
    assert neighbour.reserve(9)
    other, residual, seen, logits = TOKENS[::-1], [], [], []
    for start, end, n_other in ((0, 11, 5), (11, 12, 1), (12, 20, 3)):
        at = neighbour.length
        tokens = other[at : at + n_other] + TOKENS[start:end]
        n = len(tokens)
        spans = [Span(neighbour, 0, n_other), Span(cache, n_other, n)]
        step = Step(tokens, spans, logit_rows=[*range(n_other, n), 0], tap_layers=(1,))
        got = model.forward(step)
        residual.append(got.residual[n_other:])
        seen.append(got.seen[1][n_other:])
        logits.append(got.logits[:-1])
    assert (cache.length, neighbour.length) == (20, 9)
    np.testing.assert_allclose(np.concatenate(residual), expected.residual, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(seen), expected.seen[1], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(logits), expected.logits, atol=1e-5)


_PUSH = np.linspace(-2, 2, 32, dtype=np.float32) ** 3


class _Adds:
    """Adds a vector to some rows after one layer, and remembers which rows it was shown."""

    def __init__(self, layer: int, rows: set[int]) -> None:
        self.layer, self.rows, self.shown = layer, rows, set[tuple[int, int]]()

    def apply(self, layer: int, x: np.ndarray, first_row: int = 0) -> None:
        for i in range(len(x)):
            self.shown.add((layer, first_row + i))
            if layer == self.layer and first_row + i in self.rows:
                x[i] += _PUSH


def test_edits_change_their_rows_and_what_comes_of_them(model: TransformersModel) -> None:
    plain = _whole(model, TOKENS, tap_layers=(0, 1), logit_rows=(4, 12))
    caches = [model.new_cache(), model.new_cache()]
    assert all(cache.reserve(20) for cache in caches)
    edits: Any = _Adds(1, {30})  # the second sequence's row 10
    step = Step(
        TOKENS * 2, [Span(caches[0], 0, 20), Span(caches[1], 20, 40)],
        logit_rows=(12, 24, 32), tap_layers=(0, 1), edits=edits,
    )  # fmt: skip
    got = model.forward(step)
    assert edits.shown == {(layer, row) for layer in range(3) for row in range(40)}
    for rows in (slice(0, 20), slice(20, 40)):
        np.testing.assert_array_equal(got.seen[0][rows], plain.seen[0])
    np.testing.assert_array_equal(got.seen[1][:20], plain.seen[1])
    np.testing.assert_array_equal(got.residual[:20], plain.residual)
    np.testing.assert_allclose(got.seen[1][30], plain.seen[1][10] + _PUSH, rtol=1e-6)
    np.testing.assert_allclose(got.residual[20:30], plain.residual[:10], atol=1e-5)
    assert np.abs(got.residual[30] - plain.residual[10]).max() > 0.1
    assert np.abs(got.residual[32] - plain.residual[12]).max() > 1e-4  # attention saw it
    np.testing.assert_allclose(got.logits[0], plain.logits[1], atol=1e-5)
    np.testing.assert_allclose(got.logits[1], plain.logits[0], atol=1e-5)
    assert np.abs(got.logits[2] - plain.logits[1]).max() > 1e-4


def test_forward_to_a_layer_stops_after_it_and_goes_on(model: TransformersModel) -> None:
    expected = _whole(model, TOKENS, tap_layers=(1,))
    cache = model.new_cache()
    assert cache.reserve(20)
    parts = []
    for start, end in ((0, 12), (12, 20)):
        edits: Any = _Adds(5, set())
        step = Step(TOKENS[start:end], [Span(cache, 0, end - start)], last_layer=1, edits=edits)
        parts.append(model.forward(step).residual)
        assert {layer for layer, _ in edits.shown} == {0, 1}
    np.testing.assert_allclose(np.concatenate(parts), expected.seen[1], atol=1e-5)


def test_fork_goes_on_alone(model: TransformersModel) -> None:
    expected = _whole(model, TOKENS).residual
    cache = model.new_cache()
    assert cache.reserve(15)
    model.forward(Step(TOKENS[:15], [Span(cache, 0, 15)]))
    fork = cache.fork()
    assert fork is not None
    cache.release()
    assert cache.reserve(15)
    model.forward(Step(TOKENS[5:], [Span(cache, 0, 15)]))
    assert fork.reserve(20)
    got = model.forward(Step(TOKENS[15:], [Span(fork, 0, 5)]))
    np.testing.assert_allclose(got.residual, expected[15:], atol=1e-5)
    fork.release()
    cache.release()


def test_cache_of_a_step_that_failed_is_used_no_more(model: TransformersModel) -> None:
    class Breaks:
        def apply(self, layer: int, x: np.ndarray, first_row: int = 0) -> None:
            if layer == 1:
                raise ArithmeticError

    broken, sound = model.new_cache(), model.new_cache()
    assert broken.reserve(20)
    assert sound.reserve(20)
    edits: Any = Breaks()
    with pytest.raises(ArithmeticError):
        model.forward(Step(TOKENS, [Span(broken, 0, 20)], edits=edits))
    with pytest.raises(RuntimeError, match="failed before"):
        model.forward(Step(TOKENS, [Span(broken, 0, 20)]))
    model.forward(Step(TOKENS, [Span(sound, 0, 20)]))
    broken.release()
    assert broken.reserve(20)
    model.forward(Step(TOKENS, [Span(broken, 0, 20)]))
    broken.release()
    sound.release()


def test_caches_share_one_limit(tmp_path: Path) -> None:
    per_token = 3 * 2 * 32 * 4  # layers, keys and values, d_model, float32
    folder = _make(tmp_path / "m", "gpt2")
    model = TransformersModel.load(folder, "float32", 64, 30 * per_token, threads=1)
    assert model.max_context == 30
    first, second = model.new_cache(), model.new_cache()
    assert first.reserve(20)
    assert first.reserve(10)
    assert not second.reserve(11)
    assert second.reserve(10)
    model.forward(Step(TOKENS, [Span(first, 0, 20)]))
    assert first.fork() is None
    first.release()
    assert first.length == 0
    assert first.reserve(20)
    assert first.adopt(TOKENS, "") is None


def test_bfloat16_is_kept_by_auto_and_close(tmp_path: Path) -> None:
    folder = _make(tmp_path / "m", "gpt_neox")
    exact = _whole(_load(folder), TOKENS, logit_rows=[19])
    half = _load(folder, "bfloat16")
    assert (half.precision, half.architecture) == ("bfloat16", "gpt_neox")
    got = _whole(half, TOKENS, logit_rows=[19])
    np.testing.assert_allclose(got.logits, exact.logits, atol=0.2)
    config = json.loads((folder / "config.json").read_text())
    assert _load(folder, "auto").precision == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert _load(folder, "auto").precision == "bfloat16"
    with pytest.raises(ModelError, match="Llama family"):
        _load(folder, "int8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"model_type": "no-such"}, "cannot load"),
        ({"model_type": "t5"}, "no decoder"),
        ({"n_layer": 10**9}, "out of bounds"),
        ({"n_layer": 4}, "lack"),
        ({"n_embd": 64}, "cannot load"),
    ],
    ids=str,
)
def test_load_of_what_cannot_be_computed_says_why(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = _make(tmp_path / "m", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=reason):
        _load(folder)


def test_load_of_weights_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    folder = _make(tmp_path / "m", "gpt2")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack .*h\.1\.mlp\.c_fc\.weight"):
        _load(folder)


def test_load_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = _make(tmp_path / "m", "gpt2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load"):
        _load(folder)


def test_load_of_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError):
        _load(tmp_path / "m")


def test_load_model_takes_transformers_where_the_fast_path_cannot(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(_make(tmp_path / "m", "gpt2"), Engine(threads=1))
    assert isinstance(model, TransformersModel)
    assert "'gpt2' is not of the Llama family" in capfd.readouterr().err
    with pytest.raises(ModelError, match="takes no adapters"):
        load_adapters(tmp_path, tmp_path / "m", model)


def test_load_model_of_a_family_member_with_an_oddity_takes_transformers(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "m", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert isinstance(load_model(folder, Engine(threads=1)), TransformersModel)


async def test_worker_in_its_sandbox_serves_such_a_model(tmp_path: Path) -> None:
    folder = tiny_model.finish(_make(tmp_path / "m", "gpt2", vocab_size=259))
    process = spawn(tmp_path, folder)
    client = EngineClient(tmp_path / "e.sock")
    try:
        described = await ready(client)
        assert (described.architecture, described.dtype) == ("gpt2", "float32")
        hello = (Message(Role.USER, "hello"),)
        request = Generate("r", Sampling(8, 0.0), messages=hello, hold=False)
        async with await client.generate(request) as stream:
            events = [event async for event in stream]
        assert isinstance(events[-1], Done)
        assert events[-1].usage.completion == 8
    finally:
        await client.close()
        process.terminate()
        said = process.communicate()[1]
    assert "transformers computes this model" in said
    assert "Traceback" not in said
