"""The compiled pass equals transformers for every kind of model it takes, adapters included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_adapter
import tiny_model
from fortpoint.engine import lora, precision
from fortpoint.engine.architecture import Architecture
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Model, Result, Span, Step
from fortpoint.engine.precision import Wanted

N = 40
TOKENS = torch.randint(0, 256, (N,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER = TOKENS[::-1]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


def _load(folder: Path, wanted: Wanted = "float32", threads: int = 1) -> Llama:
    return Llama.load(folder, precision.choose(wanted), 512, 8 << 20, threads)


def _whole(model: Model, tokens: list[int], adapter: Any = None, **step: Any) -> Result:
    cache = model.new_cache()
    assert cache.reserve(len(tokens))
    result = model.forward(Step(tokens, [Span(cache, 0, len(tokens), adapter)], **step))
    cache.release()
    return _kept(result)


def _kept(result: Result) -> Result:
    seen = {layer: rows.copy() for layer, rows in result.seen.items()}
    return Result(result.residual.copy(), result.logits.copy(), seen)


@pytest.fixture(scope="module", params=tiny_model.FAMILY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = tiny_model.FAMILY[request.param]
    return tiny_model.make(tmp_path_factory.mktemp("family") / request.param, **changes)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Llama]:
    made = _load(folder)
    yield made
    made.close()


def _reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _adapter(folder: Path, name: str, seed: int, **changes: Any) -> Path:
    architecture = Architecture.load(folder)
    made = peft_adapter.tensors(architecture, seed=seed)
    return peft_adapter.write(folder.parent / "adapters" / name, made, **changes)


@torch.inference_mode()
def _merge(reference: Any, adapter: lora.LoraAdapter) -> None:
    """The adapter's products added to the weights themselves."""
    for block, pairs in zip(reference.model.layers, adapter.layers, strict=True):
        for module, pair in pairs.items():
            part = block.mlp if hasattr(block.mlp, module) else block.self_attn
            getattr(part, module).weight += torch.from_numpy(pair.B @ pair.A)


@torch.inference_mode()
def test_every_kind_equals_transformers_in_every_layer(folder: Path, model: Llama) -> None:
    expected = _reference(folder)(torch.tensor([TOKENS]), output_hidden_states=True)
    got = _whole(model, TOKENS, logit_rows=range(N), tap_layers=(0, 1, 2))
    np.testing.assert_allclose(got.logits, expected.logits[0].numpy(), **TOLERANCE)
    for layer in (0, 1):
        hidden = expected.hidden_states[layer + 1][0].numpy()
        np.testing.assert_allclose(got.seen[layer], hidden, **TOLERANCE)
    # transformers' last hidden state is after the final norm
    np.testing.assert_array_equal(got.seen[2], got.residual)
    last = expected.hidden_states[3][0].numpy()
    np.testing.assert_allclose(model.normed(got.residual), last, **TOLERANCE)


def test_every_kind_in_chunks_beside_another_equals_the_whole(model: Llama) -> None:
    expected = _whole(model, TOKENS, logit_rows=range(N), tap_layers=(1,))
    cache, neighbour = model.new_cache(), model.new_cache()
    assert cache.reserve(N)
    assert neighbour.reserve(N)
    parts = []
    for start, end, n_other in ((0, 11, 30), (11, 12, 1), (12, 13, 1), (13, 33, 2), (33, N, 1)):
        first = neighbour.length
        tokens = [*OTHER[first : first + n_other], *TOKENS[start:end]]
        n = len(tokens)
        spans = [Span(neighbour, 0, n_other), Span(cache, n_other, n)]
        step = Step(tokens, spans, logit_rows=range(n_other, n), tap_layers=(1,))
        got = _kept(model.forward(step))
        parts.append((got.residual[n_other:], got.logits, got.seen[1][n_other:]))
    residual, logits, seen = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    close = {"atol": 2e-5, "rtol": 1e-4}
    np.testing.assert_allclose(residual, expected.residual, **close)
    np.testing.assert_allclose(logits, expected.logits, **close)
    np.testing.assert_allclose(seen, expected.seen[1], **close)
    cache.release()
    neighbour.release()


@torch.inference_mode()
def test_every_kind_with_adapters_equals_merged_weights(folder: Path, model: Llama) -> None:
    architecture = Architecture.load(folder)
    paths = [_adapter(folder, "one", 1), _adapter(folder, "two", 2, use_rslora=True)]
    adapters = [None, *(lora.load(path, architecture) for path in paths)]
    caches = [model.new_cache() for _ in adapters]
    assert all(cache.reserve(N) for cache in caches)
    rows = {start: [] for start in range(3)}
    for start, end in ((0, 17), (17, 18), (18, N)):
        n = end - start
        spans = [
            Span(cache, i * n, (i + 1) * n, adapter)
            for i, (cache, adapter) in enumerate(zip(caches, adapters, strict=True))
        ]
        step = Step(TOKENS[start:end] * 3, spans, logit_rows=range(3 * n))
        for i, part in enumerate(np.split(_kept(model.forward(step)).logits, 3)):
            rows[i].append(part)
    for cache in caches:
        cache.release()
    for i, adapter in enumerate(adapters):
        reference = _reference(folder)
        if adapter is not None:
            _merge(reference, adapter)
        expected = reference(torch.tensor([TOKENS])).logits[0].numpy()
        np.testing.assert_allclose(np.concatenate(rows[i]), expected, **TOLERANCE)


def test_adapters_of_some_modules_add_only_there(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "m")
    architecture = Architecture.load(folder)
    model = _load(folder)
    for i, module in enumerate(peft_adapter.ALL):
        made = peft_adapter.tensors(architecture, (module,), {(1, module): 7}, seed=i)
        patterns = {"rank_pattern": {f"1.{_path(module)}": 7}}
        adapter = lora.load(peft_adapter.write(tmp_path / module, made, **patterns), architecture)
        reference = _reference(folder)
        _merge(reference, adapter)
        with torch.inference_mode():
            expected = reference(torch.tensor([TOKENS])).logits[0].numpy()
        got = _whole(model, TOKENS, adapter, logit_rows=range(N))
        np.testing.assert_allclose(got.logits, expected, err_msg=module, **TOLERANCE)
    model.close()


def _path(module: str) -> str:
    return f"{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}"


def test_two_threads_compute_the_same_bits(folder: Path, model: Llama) -> None:
    two = _load(folder, threads=2)
    expected = _whole(model, TOKENS, logit_rows=range(N))
    got = _whole(two, TOKENS, logit_rows=range(N))
    two.close()
    np.testing.assert_array_equal(got.residual, expected.residual)
    np.testing.assert_array_equal(got.logits, expected.logits)


@pytest.mark.parametrize(
    ("wanted", "kind"), [("bfloat16", "llama"), ("int8", "qwen2"), ("bfloat16", "qwen3")]
)
def test_coarser_precision_stays_close(tmp_path: Path, wanted: Wanted, kind: str) -> None:
    folder = tiny_model.make(tmp_path / "m", **tiny_model.FAMILY[kind])
    exact, coarse = _load(folder), _load(folder, wanted)
    expected = _whole(exact, TOKENS, logit_rows=range(N)).logits
    got = _whole(coarse, TOKENS, logit_rows=range(N)).logits
    exact.close()
    coarse.close()
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(error) < 0.1


def test_sharded_bfloat16_checkpoint_equals_the_single_one(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "m")
    reference = _reference(folder).to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    results = []
    for name in ("one", "many"):
        model = _load(tmp_path / name, "bfloat16")
        results.append(_whole(model, TOKENS, logit_rows=[N - 1]).logits)
        model.close()
    np.testing.assert_array_equal(*results)
