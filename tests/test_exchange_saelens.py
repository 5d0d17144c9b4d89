"""A dictionary goes into SAELens's files and comes back the same, or nothing is written.

``benchmarks/saelens_agreement.py`` lets the ``sae-lens`` package itself read and write them.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fortpoint.errors import InvalidRequest, ModelError, StorageError
from fortpoint.features.exchange import saelens
from fortpoint.features.exchange.whole_folder import whole_folder
from fortpoint.features.sae import CONFIG, STATS, WEIGHTS, Dictionary

D, N, K, LAYER = 24, 40, 5, 3


def dictionary(form: str = "jumprelu") -> Dictionary:
    source = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return source.standard_normal(shape).astype(np.float32)

    made = Dictionary(
        name="ours",
        layer=LAYER,
        encoder=normal(N, D),
        bias=normal(N),
        threshold=np.abs(normal(N)) + np.float32(2),
        decoder=normal(N, D),
        center=normal(D),
        training_max=np.abs(normal(N)) + np.float32(4),
        k=None,
    )
    none = np.zeros(N, np.float32)
    forms = {
        "jumprelu": made,
        "standard": dataclasses.replace(made, threshold=none),
        "topk": dataclasses.replace(made, threshold=none, k=K),
    }
    return forms[form]


def arrays(of: Dictionary) -> dict[str, Any]:
    fields = dataclasses.fields(of)
    return {field.name: getattr(of, field.name) for field in fields if field.name != "name"}


def saelens_encode(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What ``SAE.load_from_disk(folder).encode(x)`` does, step by step."""
    config = json.loads((folder / CONFIG).read_text())
    w = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    assert config["dtype"] == "float32"
    z = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "jumprelu":
        return z.relu() * (z > w["threshold"].relu())
    if config["architecture"] == "topk":
        top = z.topk(config["k"], dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
    return z.relu()


@pytest.mark.parametrize("form", ["jumprelu", "standard", "topk"])
def test_dictionary_written_and_read_is_the_same(tmp_path: Path, form: str) -> None:
    ours = dictionary(form)
    saelens.write(ours, tmp_path / "sae", "tiny")
    back = arrays(Dictionary.load(tmp_path / "sae", D, LAYER + 1))
    for name, value in arrays(ours).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert json.loads((tmp_path / "sae" / CONFIG).read_text())["architecture"] == form


@pytest.mark.parametrize("form", ["jumprelu", "standard", "topk"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_dictionary_computes_what_saelens_does(tmp_path: Path, form: str, precision: Any) -> None:
    saelens.write(dictionary(form), tmp_path / "sae", "tiny", precision)
    read = Dictionary.load(tmp_path / "sae", D, LAYER + 1)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    expected = saelens_encode(tmp_path / "sae", x).numpy()
    np.testing.assert_allclose(read.encode(x.numpy()), expected, rtol=1e-4, atol=1e-4)
    assert 0 < (expected > 0).sum() < expected.size


def test_bfloat16_rounds_the_matrices_and_nothing_else(tmp_path: Path) -> None:
    ours = dictionary()
    saelens.write(ours, tmp_path / "sae", "tiny", "bfloat16")
    stored = load_file(tmp_path / "sae" / WEIGHTS)
    expected = torch.from_numpy(ours.encoder.T.copy()).bfloat16()
    assert torch.equal(stored["W_enc"], expected)
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    rounded = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert rounded == {"W_enc", "W_dec"}
    back = Dictionary.load(tmp_path / "sae", D, LAYER + 1)
    np.testing.assert_array_equal(back.threshold, ours.threshold)
    np.testing.assert_array_equal(back.bias, ours.bias)


def test_configuration_says_what_saelens_asks_for(tmp_path: Path) -> None:
    card = {"dataset": "text", "model_name": "overridden"}
    saelens.write(dictionary("topk"), tmp_path / "sae", "tiny", metadata=card)
    assert json.loads((tmp_path / "sae" / CONFIG).read_text()) == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": N,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "dataset": "text",
            "model_name": "tiny",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "sae_lens_version": saelens.FORMAT_VERSION,
        },
    }


def test_maxima_that_are_not_known_are_not_written(tmp_path: Path) -> None:
    ours = dataclasses.replace(dictionary(), training_max=np.ones(N, np.float32))
    saelens.write(ours, tmp_path / "sae", "tiny")
    assert not (tmp_path / "sae" / STATS).exists()
    assert (Dictionary.load(tmp_path / "sae", D, LAYER + 1).training_max == 1).all()


def test_checkpoint_of_saelens_batchtopk_is_read(tmp_path: Path) -> None:
    ours = dictionary()
    norms = np.linalg.norm(ours.decoder, axis=1)
    folder = tmp_path / "sae"
    saelens.write(dictionary("topk"), folder, "theirs")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"architecture": "batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": True}
    (folder / CONFIG).write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS)
    limit = torch.tensor(2.25, dtype=torch.float64)  # theirs is a double
    save_file(weights | {"topk_threshold": limit}, folder / WEIGHTS)
    x = np.random.default_rng(2).standard_normal((30, D)).astype(np.float32)
    z = ((x - ours.center) @ ours.encoder.T + ours.bias) * norms
    expected = np.where(z > 2.25, z, 0)
    read = Dictionary.load(folder, D, LAYER + 1)
    np.testing.assert_allclose(read.encode(x), expected, rtol=1e-4, atol=1e-4)
    assert 0 < (expected > 0).sum() < expected.size


def test_thresholds_with_k_are_refused(tmp_path: Path) -> None:
    odd = dataclasses.replace(dictionary(), k=K)
    with pytest.raises(ModelError, match="keeps the k largest too"):
        saelens.write(odd, tmp_path / "sae", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    ours = dictionary()
    ours.decoder[3, 4] = np.nan
    with pytest.raises(ModelError, match="W_dec holds values that are not finite"):
        saelens.write(ours, tmp_path / "sae", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_dictionary_that_is_there_is_replaced(tmp_path: Path) -> None:
    saelens.write(dictionary("topk"), tmp_path / "sae", "tiny")
    (tmp_path / "sae" / "index.json").write_text("of the old one")
    saelens.write(dictionary(), tmp_path / "sae", "tiny")
    assert Dictionary.load(tmp_path / "sae", D, LAYER + 1).k is None
    assert sorted(file.name for file in (tmp_path / "sae").iterdir()) == [CONFIG, STATS, WEIGHTS]
    assert [file.name for file in tmp_path.iterdir()] == ["sae"]


def test_folder_that_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "letters.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="sae is there already; choose another name"):
        saelens.write(dictionary(), tmp_path / "sae", "tiny")
    assert [file.name for file in (tmp_path / "sae").iterdir()] == ["letters.txt"]


def test_full_disk_leaves_the_old_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saelens.write(dictionary("topk"), tmp_path / "sae", "tiny")
    calls = iter(range(10))

    def full(_: int) -> None:
        if next(calls):  # the first file still has room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        saelens.write(dictionary(), tmp_path / "sae", "tiny")
    assert Dictionary.load(tmp_path / "sae", D, LAYER + 1).k == K
    assert [file.name for file in tmp_path.iterdir()] == ["sae"]


def test_folder_whose_exchange_fails_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sae").mkdir()
    rename = Path.rename

    def stubborn(self: Path, target: Path) -> Path:
        if self.name == ".sae.partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stubborn)
    with (
        pytest.raises(StorageError, match="Permission denied"),
        whole_folder(tmp_path / "sae", replace=True) as partial,
    ):
        (partial / "new").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["sae"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder from elsewhere, with more in it than is asked for."""
    folder = tmp_path / "downloads" / "blocks.3"
    saelens.write(dictionary(), folder, "another-name")
    (folder / "run.py").write_text("print('never run')")
    return folder


def test_dictionary_taken_in_is_copied_as_far_as_it_is_one(theirs: Path, tmp_path: Path) -> None:
    taken = saelens.take(theirs, tmp_path / "features", "mine", D, LAYER + 1)
    assert (taken.name, taken.layer, taken.n_features) == ("mine", LAYER, N)
    kept = sorted(file.name for file in (tmp_path / "features" / "mine").iterdir())
    assert kept == [CONFIG, STATS, WEIGHTS]
    assert saelens.described_model(tmp_path / "features" / "mine") == "another-name"
    np.testing.assert_array_equal(taken.training_max, dictionary().training_max)


@pytest.mark.parametrize(
    ("d_model", "n_layers", "reason"),
    [
        (576, 30, "blocks.3 cannot be used: it reads 24 numbers a token, this model has 576"),
        (D, 2, "blocks.3 cannot be used: its hook_name is not"),
    ],
)
def test_dictionary_of_another_model_is_not_taken_in(
    theirs: Path, tmp_path: Path, d_model: int, n_layers: int, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        saelens.take(theirs, tmp_path / "features", "mine", d_model, n_layers)
    assert not (tmp_path / "features").exists()


def test_dictionary_with_a_damaged_file_is_not_taken_in(theirs: Path, tmp_path: Path) -> None:
    weights = theirs / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"blocks\.3 cannot be used: .*ends before"):
        saelens.take(theirs, tmp_path / "features", "mine", D, LAYER + 1)
    assert not (tmp_path / "features").exists()


def test_folder_that_is_none_is_not_taken_in(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing is no folder; name one that holds cfg\.json"):
        saelens.take(tmp_path / "nothing", tmp_path / "features", "mine", D, LAYER + 1)


@pytest.mark.parametrize("name", ["../mine", "", ".hidden", "directions", "a" * 65, "a/b"])
def test_name_that_is_none_is_refused(theirs: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="a name has letters"):
        saelens.take(theirs, tmp_path / "features", name, D, LAYER + 1)


def test_name_that_is_taken_is_refused(theirs: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    saelens.take(theirs, features, "mine", D, LAYER + 1)
    with pytest.raises(InvalidRequest, match="mine is there already"):
        saelens.take(theirs, features, "mine", D, LAYER + 1)
    (features / "directions").mkdir()
    (features / "directions" / "bridge.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="a direction is called bridge"):
        saelens.take(theirs, features, "bridge", D, LAYER + 1)
