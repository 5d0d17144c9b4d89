"""A file of linear probes is read only for the model that it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.errors import ModelError

_OURS, _OTHER = "sha256:aaaa", "sha256:bbbb"


def _stem(folder: Path, digest: str | None, d_model: int = 4, value: float = 1.0) -> Path:
    about = {
        "model": "tiny",
        "hook": "resid_post",
        "normalise": "rms",
        "probes": ["injection"],
        "layers": [1],
    }
    if digest is not None:
        about["digest"] = digest
    (folder / "probes.json").write_text(json.dumps(about))
    weights = np.full((1, 1, d_model), value, np.float32)
    save_file({"W": weights, "b": np.zeros(1, np.float32)}, folder / "probes.safetensors")
    return folder / "probes"


def test_probes_of_another_model_are_refused_with_both_digests(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        LinearProbes.load(_stem(tmp_path, _OTHER), 4, 2, _OURS)
    assert _OURS in refused.value.message
    assert _OTHER in refused.value.message


@pytest.mark.parametrize("digest", [None, "", _OURS])
def test_probes_of_this_model_or_without_a_digest_are_read(
    tmp_path: Path, digest: str | None
) -> None:
    assert LinearProbes.load(_stem(tmp_path, digest), 4, 2, _OURS).names == ("injection",)


@pytest.mark.parametrize(("d_model", "n_layers"), [(8, 2), (4, 1)])
def test_probes_that_do_not_fit_are_refused(tmp_path: Path, d_model: int, n_layers: int) -> None:
    with pytest.raises(ModelError, match="another model"):
        LinearProbes.load(_stem(tmp_path, _OURS), d_model, n_layers, _OURS)


def test_probes_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        LinearProbes.load(_stem(tmp_path, _OURS, value=float("nan")), 4, 2, _OURS)
