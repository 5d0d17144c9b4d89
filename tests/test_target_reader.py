"""What is read at every token is the targets' own formula, for any rows, and free where off."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.protocol import Watch
from fortpoint.engine.taps import Rows, Taps
from fortpoint.engine.target_reader import TargetReader
from fortpoint.errors import ConfigError
from fortpoint.features.directions import Direction
from fortpoint.features.library import Library
from fortpoint.features.sae import Dictionary
from fortpoint.types import Role, Segment

D, N = 64, 40
SOURCE = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return SOURCE.standard_normal(shape, np.float32)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


SAE = Dictionary(
    name="sae",
    layer=1,
    encoder=normal(N, D) / 8,
    bias=normal(N) / 10,
    threshold=np.full(N, 0.3, np.float32),
    decoder=normal(N, D),
    center=normal(D) / 4,
    training_max=SOURCE.random(N, np.float32) + np.float32(0.5),
    k=None,
)
CALM = Direction("calm", "tiny", 0, unit(normal(D)), bias=0.2, training_max=3.0)
FAR = Direction("far", "tiny", 1, unit(normal(D)), bias=-0.1, training_max=0.5)
LIBRARY = Library({"sae": SAE}, {"calm": CALM, "far": FAR})
NAMES = ("sae/7", "calm", "sae/30", "far")
SEEN = {layer: normal(9, D) for layer in (0, 1, 2)}
PROBES = LinearProbes(("a", "b"), (2,), normal(1, 2, D), np.array([0.5, -1.0], np.float32))


def expected(seen: dict[int, np.ndarray]) -> np.ndarray:
    features = SAE.encode(seen[1]) / SAE.training_max
    calm = np.maximum(seen[0] @ CALM.vector - 0.2, 0) / 3.0
    far = np.maximum(seen[1] @ FAR.vector + 0.1, 0) / 0.5
    return np.stack([features[:, 7], calm, features[:, 30], far], axis=1)


@pytest.fixture
def taps() -> Taps:
    return Taps(LIBRARY, PROBES, TargetReader.load(NAMES, LIBRARY))


def values(reading_bytes: bytes) -> np.ndarray:
    return np.frombuffer(reading_bytes, "<f4").reshape(-1, len(NAMES))


def test_targets_read_their_own_formula_on_the_stream_as_it_is(taps: Taps) -> None:
    [part] = taps.read([Rows(0, 9)], SEEN)
    np.testing.assert_allclose(part.logits[:, 2:], expected(SEEN), atol=1e-4)
    assert (part.logits[:, 2:] == 0).any()
    assert (part.logits[:, 2:] > 0).any()


def test_probes_beside_targets_are_what_they_are_alone(taps: Taps) -> None:
    [part], [alone] = taps.read([Rows(0, 9)], SEEN), Taps(LIBRARY, PROBES).read([Rows(0, 9)], SEEN)
    assert np.array_equal(part.logits[:, :2], alone.logits)


def test_row_reads_the_same_bits_whatever_stands_beside_it(taps: Taps) -> None:
    [whole] = taps.read([Rows(0, 9)], SEEN)
    for row in range(9):
        one = {layer: x[row : row + 1].copy() for layer, x in SEEN.items()}
        [part] = taps.read([Rows(0, 1)], one)
        assert part.logits.tobytes() == whole.logits[row : row + 1].tobytes()


def test_layers_of_targets_are_kept_and_the_scan_goes_as_far(taps: Taps) -> None:
    assert taps.layers([Rows(0, 9)]) == (0, 1, 2)
    assert taps.last_layer() == 2
    alone = Taps(LIBRARY, LinearProbes.none(D), TargetReader.load(("calm",), LIBRARY))
    assert (alone.layers([Rows(0, 1)]), alone.last_layer()) == ((0,), 0)


def test_reading_of_a_prompt_names_its_columns_and_an_answer_token_does_not(taps: Taps) -> None:
    watch = Watch(("sae",), 3)
    parts = taps.read([Rows(0, 4, watch), Rows(4, 9, watch)], SEEN)
    prompt = taps.reading(parts, (Segment(Role.USER, 0, 0, 9),))
    assert (prompt.probes, prompt.targets) == (("a", "b"), NAMES)
    np.testing.assert_allclose(values(prompt.target_values), expected(SEEN), atol=1e-4)
    assert len(prompt.logits) == 9 * 2 * 4
    assert prompt.features[0].dictionary == "sae"

    token = taps.last_token(parts[1])
    assert (token.probes, token.targets, token.n_tokens) == ((), (), 1)
    assert token.logits == prompt.logits[-8:]
    assert token.target_values == prompt.target_values[-16:]


def test_row_that_is_not_finite_is_not_finite_in_what_is_read(taps: Taps) -> None:
    seen = {layer: x.copy() for layer, x in SEEN.items()}
    seen[1][3] = np.nan
    [part] = taps.read([Rows(0, 9)], seen)
    assert np.isnan(part.logits[3, [2, 4, 5]]).all()
    assert np.isfinite(np.delete(part.logits, 3, axis=0)).all()


def test_nothing_watched_adds_no_column_and_no_layer() -> None:
    plain = Taps(LIBRARY, PROBES)
    [part] = plain.read([Rows(0, 9)], SEEN)
    assert part.logits.shape == (9, 2)
    assert plain.layers([Rows(0, 9)]) == (2,)
    reading = plain.reading([part], (Segment(Role.USER, 0, 0, 9),))
    assert (reading.targets, reading.target_values) == ((), b"")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clam", "no direction 'clam'.*calm"),
        ("sea/3", "no dictionary 'sea'.*sae"),
        ("sae/40", "features 0 to 39"),
        ("sae", "name a feature of it"),
        ("sae/-1", "features 0 to 39"),
    ],
)
def test_target_that_is_not_loaded_is_refused_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^watch\.targets: .*{says}"):
        TargetReader.load(("calm", name), LIBRARY)
