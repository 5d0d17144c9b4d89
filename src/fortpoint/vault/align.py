"""Undo what changes a checkpoint's numbers and not what it computes.

    aligned = align_layer(suspect_layer, base_layer, geometry, residual)

Whoever hides a copy may permute neurons and heads, scale a neuron's input against its output,
mix a value head's rows against the output matrix, turn pairs of query and key, rotate the whole
residual stream, and fold the norms' gains. Each is found from the base and the suspect alone,
**never from a lease's key**: whatever this does, an innocent lease's statistic stays what it is.

Order: the residual stream (orthogonal Procrustes on the embedding), the norms' gains, neurons by
their gates, heads by the space that their rows span, then scales within both. What is as it was
is left as it is, since every estimate costs a little of the mark.

Not undone: layers in another order, and changes that cost quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float32]
Layer = dict[str, Floats]

MATRICES = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
NORMS = {"norm_attention": "input_layernorm.weight", "norm_mlp": "post_attention_layernorm.weight"}
_READS = {"q": "norm_attention", "k": "norm_attention", "v": "norm_attention"}
_READS |= {"gate": "norm_mlp", "up": "norm_mlp"}
_WRITES = ("o", "down")

_SAME = 0.5  # mean cosine from which rows count as unmoved
_UNMIXED = 0.1  # departure from one, or from the identity, below which a scale is left alone
_TINY = 1e-12
_MOST_TOKENS = 16_384


@dataclass(frozen=True)
class Geometry:
    """Of the attention heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


def residual_rotation(suspect: Floats, base: Floats) -> Floats | None:
    """``R`` ``[d, d]`` with ``suspect = base R``, or None where the stream is as it was.

    Both are embeddings ``[tokens, d]``; the first rows that both have are used.
    """
    if suspect.ndim != 2 or suspect.shape[1] != base.shape[1]:
        return None
    n = min(len(suspect), len(base), _MOST_TOKENS)
    theirs, ours = suspect[:n], base[:n]
    if _mean_cosine(theirs, ours) > _SAME:
        return None
    left, _, right = np.linalg.svd((ours.T @ theirs).astype(np.float64))
    rotation = (left @ right).astype(np.float32)
    return rotation if _mean_cosine(theirs @ rotation.T, ours) > _SAME else None


def align_layer(
    suspect: Layer, base: Layer, geometry: Geometry, rotation: Floats | None = None
) -> Layer:
    """The suspect's layer in the base's coordinates. Both are keyed as ``MATRICES`` and ``NORMS``;
    matrices that the suspect lacks, or has in another shape, are absent."""
    layer = {
        name: matrix
        for name, matrix in suspect.items()
        if name in base and matrix.shape == base[name].shape
    }
    _undo_stream(layer, base, rotation)
    if {"gate", "up", "down"} <= layer.keys() and base["down"].T.shape == base["gate"].shape:
        _undo_neurons(layer, base)
    if {"q", "k", "v", "o"} <= layer.keys() and _has_heads(base, geometry):
        _undo_heads(layer, base, geometry)
    return {name: matrix for name, matrix in layer.items() if name in MATRICES}


def _undo_stream(layer: Layer, base: Layer, rotation: Floats | None) -> None:
    for name, norm in _READS.items():
        if name not in layer:
            continue
        gain, own = layer.get(norm), base.get(norm)
        if rotation is None and (gain is None or own is None or np.allclose(gain, own, 0.05)):
            continue
        folded = layer[name] if gain is None else layer[name] * gain
        turned = folded if rotation is None else folded @ rotation.T
        layer[name] = np.asarray(
            turned if own is None else turned / _away_from_zero(own), np.float32
        )
    for name in _WRITES:
        if name in layer and rotation is not None:
            layer[name] = rotation @ layer[name]


def _undo_neurons(layer: Layer, base: Layer) -> None:
    """Neurons in the base's order; each one's up and down weights in the base's scale."""
    if _mean_cosine(layer["gate"], base["gate"]) < _SAME:
        order = _matched(_unit(base["gate"]) @ _unit(layer["gate"]).T)
        layer["gate"], layer["up"] = layer["gate"][order], layer["up"][order]
        layer["down"] = layer["down"][:, order]
    scale = _ratios(layer["up"], base["up"])
    layer["up"] = _rescaled(layer["up"], scale)
    columns = _ratios(layer["down"].T, base["down"].T)
    layer["down"] = np.ascontiguousarray(_rescaled(layer["down"].T, columns).T)


def _undo_heads(layer: Layer, base: Layer, geometry: Geometry) -> None:
    d, per_group = geometry.head_dim, geometry.n_heads // geometry.n_kv_heads
    theirs, ours = _heads(layer, d), _heads(base, d)
    if min(_mean_overlap(theirs[name], ours[name]) for name in "qkv") < _SAME:
        overlap = _overlaps(ours["k"], theirs["k"]) + _overlaps(ours["v"], theirs["v"])
        groups = _matched(overlap)
        among = _overlaps(ours["q"], theirs["q"])
        order = []
        for own, group in enumerate(groups):
            rows = range(own * per_group, (own + 1) * per_group)
            columns = range(group * per_group, (group + 1) * per_group)
            order += [columns[i] for i in _matched(among[np.ix_(rows, columns)])]
        theirs = {"k": theirs["k"][groups], "v": theirs["v"][groups]} | {
            name: theirs[name][order] for name in "qo"
        }
    for group in range(geometry.n_kv_heads):
        heads = range(group * per_group, (group + 1) * per_group)
        _unmix(theirs, ours, group, heads)
        _unturn(theirs["k"][group], ours["k"][group])
        for head in heads:
            _unturn(theirs["q"][head], ours["q"][head])
    for name in "qkv":
        layer[name] = theirs[name].reshape(base[name].shape)
    layer["o"] = np.ascontiguousarray(theirs["o"].reshape(-1, len(base["o"])).T)


def _has_heads(base: Layer, geometry: Geometry) -> bool:
    """Whether the matrices are those of as many heads."""
    rows, kv_rows = (n * geometry.head_dim for n in (geometry.n_heads, geometry.n_kv_heads))
    d_model = len(base["o"])
    shapes = [base[name].shape for name in "qkv"] + [base["o"].T.shape]
    return shapes == [(n, d_model) for n in (rows, kv_rows, kv_rows, rows)]


def _heads(layer: Mapping[str, Floats], head_dim: int) -> dict[str, Floats]:
    """Each ``[heads, head_dim, d_model]``, of the caller's own."""
    d_model = len(layer["o"])
    parts = {name: layer[name].reshape(-1, head_dim, d_model).copy() for name in "qkv"}
    return parts | {"o": np.ascontiguousarray(layer["o"].T).reshape(-1, head_dim, d_model)}


def _unmix(theirs: dict[str, Floats], ours: dict[str, Floats], group: int, heads: range) -> None:
    """``V' = A V`` and ``O' = O / A`` of a group, where ``A`` is not nearly the identity."""
    value, own = theirs["v"][group], ours["v"][group]
    gram = own @ own.T + np.float32(_TINY) * np.eye(len(own), dtype=np.float32)
    mixed = np.linalg.solve(gram, own @ value.T).T
    if np.linalg.norm(mixed - np.eye(len(own))) < _UNMIXED * len(own) ** 0.5:
        return
    if np.linalg.cond(mixed) < 1e6:
        theirs["v"][group] = np.linalg.solve(mixed, value)
        for head in heads:
            theirs["o"][head] = mixed.T @ theirs["o"][head]


def _unturn(theirs: Floats, ours: Floats) -> None:
    """Scale and angle of each rotary pair ``(i, i + d / 2)``, undone in place."""
    half = len(ours) // 2
    z, own = theirs[:half] + 1j * theirs[half:], ours[:half] + 1j * ours[half:]
    turn = (z * own.conj()).sum(axis=1) / ((own * own.conj()).sum(axis=1).real + _TINY)
    turn = np.where(np.abs(turn) < _TINY, 1, turn)
    if np.abs(turn - 1).max() > _UNMIXED:
        z = z / turn[:, None]
        theirs[:half], theirs[half:] = z.real, z.imag


def _rescaled(matrix: Floats, scale: Floats) -> Floats:
    if np.median(np.abs(scale - 1)) < _UNMIXED / 10:
        return matrix
    return matrix / scale[:, None]


def _ratios(theirs: Floats, ours: Floats) -> Floats:
    """``[rows]``: the median of what each row's larger weights were multiplied by."""
    large = np.abs(ours) > ours.std(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(large & (theirs != 0), theirs / ours, np.nan)
    some = np.isfinite(ratios).any(axis=1)
    scale = np.ones(len(ours), np.float32)
    scale[some] = np.nanmedian(ratios[some], axis=1)
    return np.where(np.abs(scale) < 1e-6, np.float32(1), scale)


def _matched(similarity: NDArray[np.floating]) -> NDArray[np.intp]:
    """For each row the column that is its own, so that the sum is greatest."""
    order: NDArray[np.intp] = linear_sum_assignment(similarity, maximize=True)[1]
    return order


def _overlaps(ours: Floats, theirs: Floats) -> Floats:
    """``[heads, heads]``: the share of one head's row space that lies in another's."""
    bases = [np.linalg.qr(np.swapaxes(heads, 1, 2))[0] for heads in (ours, theirs)]
    products = np.einsum("adi,bdj->abij", *bases, optimize=True)
    return np.asarray((products**2).sum(axis=(2, 3)) / ours.shape[1], np.float32)


def _mean_overlap(theirs: Floats, ours: Floats) -> float:
    return float(np.diagonal(_overlaps(ours, theirs)).mean())


def _mean_cosine(a: Floats, b: Floats) -> float:
    return float((_unit(a) * _unit(b)).sum(axis=1).mean())


def _unit(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / (norms + np.float32(_TINY)), np.float32)


def _away_from_zero(gain: Floats) -> Floats:
    return np.where(np.abs(gain) < 1e-6, np.float32(1e-6), gain)
