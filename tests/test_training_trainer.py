"""A training step computes what automatic differentiation computes, and learns what is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import harvested
from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.training.batches import Scaling
from fortpoint.features.training.export import calibrate, dictionary_of
from fortpoint.features.training.settings import Settings
from fortpoint.features.training.trainer import Trainer, geometric_median

BATCH, D_IN, D_SAE, K = 64, 24, 40, 5


def settings(architecture: str, **changes: Any) -> Settings:
    prefixes = (8, 20) if architecture == "matryoshka" else ()
    given: dict[str, Any] = {
        "architecture": architecture,
        "prefixes": prefixes,
        "d_sae": D_SAE,
        "k": K,
        "batch": BATCH,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
    }
    return Settings(**{**given, **changes})


def batch(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((BATCH, D_IN), np.float32)


def active(trainer: Trainer) -> torch.Tensor:
    """Which features the trainer's last step took to be active, ``[BATCH, D_SAE]``."""
    mask = torch.zeros(BATCH, D_SAE)
    pairs = trainer._pairs
    for i in range(BATCH):
        mask[i, pairs.cols[i, : pairs.counts[i]]] = 1
    return mask


def autograd(trainer: Trainer, x: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the loss by torch, over the same active features."""
    p = {n: torch.tensor(v, requires_grad=True) for n, v in trainer.parameters.items()}
    rows = torch.tensor(x) - p["b_dec"]
    acts = torch.relu(rows @ p["W_enc"].T + p["b_enc"]) * mask
    losses = []
    for end in trainer.settings.ends:
        made = acts[:, :end] @ p["W_dec"][:end]
        losses.append(((made - rows) ** 2).sum() / (BATCH * D_IN))
    torch.stack(losses).mean().backward()
    gradients = {n: v.grad for n, v in p.items() if v.grad is not None}
    along = (gradients["W_dec"] * p["W_dec"].detach()).sum(dim=1, keepdim=True)
    gradients["W_dec"] = gradients["W_dec"] - along * p["W_dec"].detach()
    return gradients


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_step_has_the_gradients_of_automatic_differentiation(architecture: str) -> None:
    trainer = Trainer(settings(architecture), D_IN, n_steps=10)
    trainer.parameters["b_enc"][:] = np.random.default_rng(1).normal(0, 0.1, D_SAE)
    trainer.parameters["b_dec"][:] = np.random.default_rng(2).normal(0, 0.1, D_IN)
    before = {name: value.copy() for name, value in trainer.parameters.items()}
    x = batch()
    trainer.step(x)
    trainer.parameters = before
    expected = autograd(trainer, x, active(trainer))
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            trainer._gradients[name], gradient.numpy(), rtol=2e-3, atol=2e-6, err_msg=name
        )
    trainer.close()


def test_step_of_jumprelu_has_the_gradients_of_automatic_differentiation() -> None:
    trainer = Trainer(settings("jumprelu", sparsity=0.0), D_IN, n_steps=10)
    trainer.parameters["threshold"][:] = 0.4
    before = {name: value.copy() for name, value in trainer.parameters.items()}
    x = batch()
    trainer.step(x)
    trainer.parameters = before
    z = (x - before["b_dec"]) @ before["W_enc"].T + before["b_enc"]
    expected = autograd(trainer, x, torch.tensor((z > 0.4).astype(np.float32)))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(
            trainer._gradients[name], expected[name].numpy(), rtol=2e-3, atol=2e-6, err_msg=name
        )
    acts = np.where(z > 0.4, z, 0)
    slopes = (acts @ before["W_dec"] - x) @ before["W_dec"].T * (2 / (BATCH * D_IN))
    near = np.abs(z - 0.4) < trainer.settings.bandwidth / 2
    by_threshold = -(slopes * near).sum(axis=0) * 0.4 / trainer.settings.bandwidth
    np.testing.assert_allclose(trainer._gradients["threshold"], by_threshold, rtol=2e-3, atol=2e-5)
    trainer.close()


@pytest.mark.parametrize(("architecture", "each"), [("topk", True), ("batchtopk", False)])
def test_step_takes_the_k_largest_activations(architecture: str, each: bool) -> None:
    trainer = Trainer(settings(architecture), D_IN, n_steps=10)
    for seed in range(3):  # the guess of the limit comes from the step before
        x = batch(seed)
        z = (x - trainer.parameters["b_dec"]) @ trainer.parameters["W_enc"].T
        z = np.maximum(z + trainer.parameters["b_enc"], 0)
        trainer.step(x)
        mask = active(trainer).numpy().astype(bool)
        if each:
            assert (mask.sum(axis=1) == K).all()
            assert z[mask].reshape(BATCH, K).min(axis=1).sum() >= 0.98 * np.sort(z)[:, -K].sum()
        else:
            assert K * BATCH <= mask.sum() <= 1.2 * K * BATCH
            assert z[mask].min() >= 0.98 * np.sort(z.ravel())[-int(mask.sum())]
    trainer.close()


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "matryoshka"])
def test_training_finds_the_planted_features(architecture: str) -> None:
    n = harvested.N_PLANTED
    prefixes = (n // 2,) if architecture == "matryoshka" else ()
    chosen = settings(
        architecture,
        d_sae=2 * n,
        k=3,
        batch=256,
        prefixes=prefixes,
        learning_rate=4e-3,
        dead_after=5000,
        bandwidth=0.3,
    )
    n_steps = 900
    trainer = Trainer(chosen, harvested.D_MODEL, n_steps)
    if architecture == "jumprelu":
        trainer.parameters["threshold"][:] = 0.5
    rows, directions = harvested.planted(256 * 60)
    rows = (rows - rows.mean(axis=0)) / rows.std()
    trainer.begin(rows[:2000])
    for step in range(n_steps):
        at = step % 60 * 256
        metrics = trainer.step(rows[at : at + 256])
    found = np.abs(directions @ trainer.parameters["W_dec"].T).max(axis=1)
    assert metrics.fvu < 0.2
    assert np.median(found) > 0.9
    np.testing.assert_allclose(np.linalg.norm(trainer.parameters["W_dec"], axis=1), 1, rtol=1e-4)
    trainer.close()


def test_training_that_goes_on_equals_the_uninterrupted_one() -> None:
    whole = Trainer(settings("batchtopk"), D_IN, n_steps=8)
    for seed in range(8):
        whole.step(batch(seed))
    first = Trainer(settings("batchtopk"), D_IN, n_steps=8)
    for seed in range(3):
        first.step(batch(seed))
    second = Trainer(settings("batchtopk"), D_IN, n_steps=8)
    second.restore(first.state())
    for seed in range(3, 8):
        second.step(batch(seed))
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(value, second.parameters[name], err_msg=name)
    for trainer in (whole, first, second):
        trainer.close()


def test_step_with_a_number_that_is_none_is_refused() -> None:
    trainer = Trainer(settings("batchtopk"), D_IN, n_steps=8)
    x = batch()
    x[3, 5] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        trainer.step(x)
    trainer.close()


def test_dead_features_are_revived_by_the_auxiliary_loss() -> None:
    n_dead = {}
    for auxiliary in (0.0, 1.0):
        trainer = Trainer(settings("topk", dead_after=BATCH, auxiliary=auxiliary), D_IN, 300)
        trainer.parameters["b_enc"][:10] = -2  # seldom positive, hardly ever among the largest
        n_dead[auxiliary] = [trainer.step(batch(seed)).n_dead for seed in range(300)]
        trainer.close()
    assert max(n_dead[0.0][:20]) >= 8
    assert np.mean(n_dead[1.0][-50:]) < 0.5 * np.mean(n_dead[0.0][-50:])


def test_dictionary_of_a_trainer_reconstructs_in_the_models_units() -> None:
    rows, _ = harvested.planted(4096)
    mean, factor = rows.mean(axis=0), 1.7
    scaling = Scaling(mean, factor)
    chosen = settings("batchtopk", d_sae=96, k=3, batch=256, learning_rate=4e-3)
    trainer = Trainer(chosen, harvested.D_MODEL, 200)
    x = scaling.apply(rows)
    trainer.begin(x)
    for step in range(200):
        trainer.step(x[step % 16 * 256 :][:256])
    dictionary = calibrate(dictionary_of(trainer, scaling, "made", 3), rows, k=3)
    acts = dictionary.encode(rows)
    assert (acts > 0).sum(axis=1).mean() == pytest.approx(3, rel=0.01)
    made = dictionary.center + acts @ dictionary.decoder
    explained = 1 - np.square(made - rows).sum() / np.square(rows - mean).sum()
    assert explained > 0.5
    own = (x - trainer.parameters["b_dec"]) @ trainer.parameters["W_enc"].T
    own += trainer.parameters["b_enc"]
    theirs = dictionary.preactivations(rows) * factor
    np.testing.assert_allclose(theirs, own, rtol=1e-3, atol=1e-3)
    trainer.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"k": D_SAE + 1},
        {"prefixes": (4,)},
        {"architecture": "matryoshka", "prefixes": ()},
        {"architecture": "matryoshka", "prefixes": (20, 8)},
        {"architecture": "matryoshka", "prefixes": (D_SAE,)},
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        settings(changes.pop("architecture", "topk"), **changes).check()


def test_rate_warms_up_and_decays() -> None:
    chosen = settings("topk", warmup_steps=10, decay_share=0.2)
    rates = [chosen.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[10:80] == [1e-3] * 70
    assert rates[99] == pytest.approx(1e-3 / 20)


def test_geometric_median_is_not_moved_by_one_far_row() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    rows[0] = 1e4
    assert np.abs(geometric_median(rows)).max() < 0.2
