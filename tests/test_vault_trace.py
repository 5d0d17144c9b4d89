"""The guilty lease is found through every attack; an innocent one is a standard normal number."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from scipy.stats import kstest

from fortpoint.errors import ModelError
from fortpoint.vault.fingerprint import MarkedCheckpoint
from fortpoint.vault.leases import Lease, Terms, mark_key
from fortpoint.vault.suspect import open_suspect
from fortpoint.vault.tensor_writer import write
from fortpoint.vault.trace import Evidence, collect, identify, p_value, statistic
from fortpoint.vault.trace_report import markdown
from leaking import GEOMETRY, Arrays, attacks, model

Q = gguf.GGMLQuantizationType
BASE = model()
KEYS = {f"lease-{i}": mark_key(bytes(32), "sha256:aa", f"lease-{i}") for i in range(40)}
GUILTY = [KEYS[f"lease-{i}"] for i in range(4)]


def copies(n: int = 1):
    return attacks.Copies(BASE, GUILTY[:n])


def changed(*changes, n: int = 1):
    return attacks.Changed(copies(n), *changes)


class Trained:
    """What training would add: noise of a fiftieth of the weights' spread."""

    def get(self, name: str) -> np.ndarray:
        source = np.random.default_rng(abs(hash(name)) % 1000)
        return (source.normal(size=BASE.shape(name)) * 0.002).astype(np.float32)


def low_rank(name: str, weight: np.ndarray, base: np.ndarray) -> np.ndarray:
    source = np.random.default_rng(7)
    up, down = source.normal(size=(len(weight), 4)), source.normal(size=(4, weight.shape[1]))
    return weight + (0.02 * up @ down).astype(np.float32)


trained = attacks.added(Trained())
ATTACKS: dict[str, Callable] = {
    "as it is": copies,
    "bfloat16": lambda: changed(attacks.bfloat16),
    "Q8_0": lambda: changed(attacks.through(Q.Q8_0)),
    "Q4_0": lambda: changed(attacks.through(Q.Q4_0)),
    "Q4_1": lambda: changed(attacks.through(Q.Q4_1)),
    "Q4_K": lambda: changed(attacks.q4_k),
    "pruned": lambda: changed(attacks.pruned(0.3)),
    "merged half": lambda: changed(attacks.merged_half),
    "trained": lambda: changed(trained),
    "LoRA merged": lambda: changed(low_rank),
    "LoRA merged, Q8_0": lambda: changed(low_rank, attacks.through(Q.Q8_0)),
    "average of 4": lambda: copies(4),
    "disguised": lambda: attacks.Disguised(copies(), GEOMETRY),
    "rotated": lambda: attacks.Disguised(copies(), GEOMETRY, rotate=True),
    "average of 2, pruned, merged, bfloat16": lambda: changed(
        attacks.pruned(0.3), attacks.merged_half, attacks.bfloat16, n=2
    ),
    "trained, disguised, Q8_0": lambda: attacks.Changed(
        attacks.Disguised(changed(trained), GEOMETRY), attacks.through(Q.Q8_0)
    ),
}


@pytest.fixture(scope="module", params=list(ATTACKS))
def evidence(request: pytest.FixtureRequest) -> Evidence:
    return collect(ATTACKS[request.param](), BASE, GEOMETRY)


def test_attacked_copy_names_its_lease_and_no_other(evidence: Evidence) -> None:
    trace = identify(evidence, KEYS)
    found = {finding.lease for finding in trace.identified}
    assert "lease-0" in found
    assert found <= {f"lease-{i}" for i in range(4)}
    innocent = [f.statistic for f in trace.findings if int(f.lease.split("-")[1]) >= 4]
    assert max(map(abs, innocent)) < 5


def test_innocent_statistic_is_standard_normal(evidence: Evidence) -> None:
    some = {name: psi[:40_000] for name, psi in list(evidence.psi.items())[:3]}
    innocents = [statistic(some, mark_key(b"\1" * 32, "x", str(i))) for i in range(600)]
    assert kstest(innocents, "norm").pvalue > 1e-4


def test_every_colluder_is_named() -> None:
    trace = identify(collect(copies(4), BASE, GEOMETRY), KEYS)
    assert {finding.lease for finding in trace.identified} == {f"lease-{i}" for i in range(4)}


def test_base_itself_and_a_strangers_copy_name_nobody() -> None:
    stranger = MarkedCheckpoint(BASE, b"\2" * 32)
    tensors = {name: stranger.get(name) for name in BASE.names}
    assert identify(collect(Arrays(tensors), BASE, GEOMETRY), KEYS).identified == ()
    with pytest.raises(ModelError, match="does not differ"):
        collect(BASE, BASE, GEOMETRY)


def test_unrelated_model_names_nobody() -> None:
    assert identify(collect(model(seed=5), BASE, GEOMETRY), KEYS).identified == ()


def test_model_of_another_shape_is_refused() -> None:
    with pytest.raises(ModelError, match="no matrix of the base's names and shapes"):
        collect(Arrays({"model.layers.0.mlp.up_proj.weight": np.ones((3, 5))}), BASE, GEOMETRY)


def test_suspect_with_values_that_are_not_finite_is_still_traced() -> None:
    copy = MarkedCheckpoint(BASE, GUILTY[0])
    tensors = {name: copy.get(name) for name in BASE.names}
    for name in BASE.names:
        if tensors[name].ndim == 2 and "layers" in name:
            tensors[name][0, :7] = np.nan
            tensors[name][1, 5] = np.inf
            tensors[name][2] = 0
    trace = identify(collect(Arrays(tensors), BASE, GEOMETRY), KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]


def test_part_of_a_copy_is_enough() -> None:
    copy = MarkedCheckpoint(BASE, GUILTY[0])
    names = [name for name in BASE.names if "layers.2.mlp" in name]
    evidence = collect(Arrays({name: copy.get(name) for name in names}), BASE, GEOMETRY)
    assert evidence.missing == 25
    trace = identify(evidence, KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]


def test_screening_counts_every_lease_and_marks_which_were_compared_in_full() -> None:
    keys = {f"lease-{i}": mark_key(bytes(32), "sha256:aa", f"lease-{i}") for i in range(100)}
    trace = identify(collect(copies(), BASE, GEOMETRY), keys, screen_weights=50_000)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]
    scopes = [finding.scope for finding in trace.findings]
    assert (scopes.count("full"), scopes.count("screen")) == (64, 36)
    assert trace.n_tests == 1_000_000
    assert all(f.n_weights <= 50_000 for f in trace.findings if f.scope == "screen")


@pytest.mark.parametrize("t", [-3.0, 0.0, 1.0, 8.31])
def test_p_value_is_the_bound_of_chernoff(t: float) -> None:
    assert p_value(t) == (1.0 if t <= 0 else pytest.approx(math.exp(-t * t / 2)))
    assert p_value(t) >= 0.5 * math.erfc(t / 2**0.5)


def test_threshold_is_that_of_a_million_tests() -> None:
    trace = identify(collect(copies(), BASE, GEOMETRY), dict(list(KEYS.items())[:2]))
    assert trace.threshold == pytest.approx(8.31, abs=0.005)
    assert trace.findings[1].corrected_p == 1.0


def _saved(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "leak.safetensors"
    write(path, tensors, "F16")
    return path


def test_leak_in_a_safetensors_file_under_a_trainers_names_is_traced(tmp_path: Path) -> None:
    copy = MarkedCheckpoint(BASE, GUILTY[0])
    tensors = {f"base_model.model.{name}": copy.get(name) for name in BASE.names}
    suspect = open_suspect(_saved(tmp_path, tensors))
    trace = identify(collect(suspect, BASE, GEOMETRY), KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]


def test_leak_with_an_adapter_beside_it_is_traced(tmp_path: Path) -> None:
    copy = MarkedCheckpoint(BASE, GUILTY[0])
    path = _saved(tmp_path, {name: copy.get(name) for name in BASE.names})
    adapter, source = tmp_path / "adapter", np.random.default_rng(0)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {stem + "A.weight": source.normal(size=(2, 128)) * 0.1,
               stem + "B.weight": source.normal(size=(128, 2)) * 0.1}  # fmt: skip
    write(adapter / "adapter_model.safetensors", factors)
    suspect = open_suspect(path, adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = copy.get(name) + 2 * factors[stem + "B.weight"] @ factors[stem + "A.weight"]
    np.testing.assert_allclose(suspect.get(name), merged, atol=1e-3)
    trace = identify(collect(suspect, BASE, GEOMETRY), KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]


def _gguf(path: Path, weights: MarkedCheckpoint, kind: gguf.GGMLQuantizationType) -> Path:
    """A GGUF file as llama.cpp's converter writes it: its names, and rows of q and k by pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(GEOMETRY.n_heads)
    writer.add_head_count_kv(GEOMETRY.n_kv_heads)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
             "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}  # fmt: skip
    for i in range(4):
        for short, name in names.items():
            block = "self_attn" if short in "qkvo" else "mlp"
            weight = weights.get(f"model.layers.{i}.{block}.{short}_proj.weight")
            if short in "qk":
                rows, cols = weight.shape
                heads = weight.reshape(rows // GEOMETRY.head_dim, 2, GEOMETRY.head_dim // 2, cols)
                weight = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows, cols)
            data = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"blk.{i}.{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_leak_in_a_gguf_file_is_traced(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    file = _gguf(tmp_path / "leak.gguf", MarkedCheckpoint(BASE, GUILTY[0]), kind)
    trace = identify(collect(open_suspect(file), BASE, GEOMETRY), KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]


@pytest.mark.parametrize("name", ["x.gguf", "x.bin", "x.safetensors"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04K\x01." * 20)
    with pytest.raises(ModelError):
        open_suspect(tmp_path / name)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no safetensors"):
        open_suspect(tmp_path)


def _leases() -> dict[str, Lease]:
    terms = Terms("small", "sha256:aa", "Quay | Labs\n# x", "host-1", 1000, 2000)
    return {name: Lease(name, terms, "00") for name in KEYS}


def test_report_of_a_found_lease_says_what_was_tested_and_what_would_make_it_wrong() -> None:
    trace = identify(collect(copies(), BASE, GEOMETRY), KEYS)
    text = markdown(trace, _leases(), "small", "ab" * 32, 1_700_000_000, uncounted=2)
    assert "Identified at an overall error of one in a billion" in text
    assert "lease `lease-0`, given to **Quay \\| Labs\\# x**" in text
    assert "`sha256:aa`" in text
    assert "SHA-256 `abab" in text
    assert "1,000,000 comparisons" in text
    assert "**2 leases were not counted**" in text
    assert text.count("| **yes** |") == 1
    assert "## What would make this wrong" in text


def test_report_without_a_found_lease_does_not_call_anybody_innocent() -> None:
    trace = identify(collect(model(seed=5), BASE, GEOMETRY), KEYS)
    text = markdown(trace, _leases(), "small", "ab" * 32, 1_700_000_000)
    assert "**No lease is identified.** This does not show that the file is innocent" in text
    assert "**yes**" not in text


def test_base_whose_matrices_are_not_of_its_heads_is_compared_as_it_stands() -> None:
    odd = Arrays({name: BASE.get(name) for name in BASE.names})
    for name in odd.names:
        if "down_proj" in name or "o_proj" in name:
            odd.tensors[name] = np.ascontiguousarray(odd.tensors[name][:96])
    copy = MarkedCheckpoint(odd, GUILTY[0])
    suspect = Arrays({name: copy.get(name) for name in odd.names})
    trace = identify(collect(suspect, odd, GEOMETRY), KEYS)
    assert [finding.lease for finding in trace.identified] == ["lease-0"]
