"""A dictionary computes what SAELens 6 computes with the same folder, whatever its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fortpoint.errors import ModelError
from fortpoint.features.library import Library
from fortpoint.features.sae import CONFIG, STATS, WEIGHTS, Dictionary

D, N, K = 24, 40, 5


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(6)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    return {name: torch.randn(s, generator=source).to(dtype) for name, s in shapes.items()}


def write(folder: Path, made: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    given = {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": hook} | config
    (folder / CONFIG).write_text(json.dumps(given))
    save_file(made, folder / WEIGHTS)
    return folder


def saelens(made: dict[str, torch.Tensor], x: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """SAELens's own steps, in float64: ``encode`` of its inference classes."""
    w = {name: tensor.double() for name, tensor in made.items()}
    x = x.double() - w["b_dec"] if config.get("apply_b_dec_to_input", True) else x.double()
    z = x @ w["W_enc"] + w["b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        z = z * w["W_dec"].norm(dim=-1)
    acts = z.relu()
    if "threshold" in w:
        return acts * (z > w["threshold"])
    if "topk_threshold" in w:
        return acts * (z > w["topk_threshold"])
    if "k" in config:
        top = acts.topk(config["k"], dim=-1)
        return torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    return acts


FORMS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "standard": ({}, {}),
    "standard, center not taken away": ({"apply_b_dec_to_input": False}, {}),
    "jumprelu": ({"architecture": "jumprelu"}, {"threshold": torch.linspace(-1, 9, N)}),
    "topk": ({"architecture": "topk", "k": K}, {}),
    "topk, rescaled": (
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        {},
    ),
    "batchtopk": ({"architecture": "batchtopk", "k": K}, {"topk_threshold": torch.tensor(3.5)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dictionary_encodes_as_saelens_does(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    config, more = FORMS[form]
    made = tensors(dtype) | more
    dictionary = Dictionary.load(write(tmp_path / "sae", made, **config), D, 4)
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    expected = saelens(made, x, config).numpy()
    np.testing.assert_allclose(dictionary.encode(x.numpy()), expected, rtol=1e-4, atol=1e-4)
    assert 0 < (expected > 0).sum() < expected.size


@pytest.mark.parametrize("form", FORMS)
def test_dictionary_is_held_as_the_forward_pass_reads_it(tmp_path: Path, form: str) -> None:
    config, more = FORMS[form]
    folder = write(tmp_path / "sae", tensors(torch.bfloat16) | more, **config)
    save_file({"max_activations": torch.arange(N).bfloat16()}, folder / STATS)
    held = Dictionary.load(folder, D, 4)
    arrays = (held.encoder, held.decoder, held.bias, held.threshold, held.center, held.training_max)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)
    assert held.encoder.shape == held.decoder.shape == (N, D)
    assert held.training_max[:3].tolist() == [1.0, 1.0, 2.0]  # the first was never active
    assert (held.threshold >= 0).all()


def test_target_of_a_feature_is_read_as_its_dictionary_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "sae", tensors())
    library = Library.load(tmp_path, D, 4)
    target, held = library.resolve("sae/7"), library.dictionary("sae")
    x = np.random.default_rng(2).standard_normal((5, D), np.float32)
    read = x @ target.encoder + np.float32(target.bias)
    np.testing.assert_allclose(read, held.preactivations(x)[:, 7], rtol=1e-4, atol=1e-4)


def test_maximum_that_is_negative_refuses_the_dictionary(tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", tensors())
    save_file({"max_activations": -torch.ones(N)}, folder / STATS)
    with pytest.raises(ModelError, match="negative maximum"):
        Dictionary.load(folder, D, 4)


@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (torch.full((D,), 0.5), "does not have length 1"),
        (torch.full((D,), torch.nan), "not finite"),
        (torch.ones(D + 1), "has the shape"),
    ],
)
def test_direction_that_is_none_is_left_out(
    tmp_path: Path, direction: torch.Tensor, reason: str
) -> None:
    folder = tmp_path / "directions"
    folder.mkdir()
    card = {"model": "tiny", "hook": "resid_post", "layer": 1, "training_maximum": 4.0}
    for name, vector in {"odd": direction, "sound": torch.eye(D)[3] * 1.003}.items():
        (folder / f"{name}.json").write_text(json.dumps(card))
        save_file({"direction": vector.bfloat16()}, folder / f"{name}.safetensors")
    library = Library.load(tmp_path, D, 4)
    assert reason in library.left_out["odd"]
    assert library.directions["sound"].vector.tolist() == np.eye(D)[3].tolist()
