"""A concept is found in the layer and direction where it lies, and its quality is honest."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from concept_world import BEST_LAYER, BRIDGE, POSITIVES, D, Words, World, sentence
from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.concepts.discriminant import Layout, cross_fit, fit
from fortpoint.features.concepts.examples import Examples
from fortpoint.features.concepts.learn import Settings, learn
from fortpoint.features.concepts.quality import auroc
from fortpoint.features.concepts.reading import Rows, read, tokenize

ALL = Settings(layers=tuple(range(8)))


@pytest.fixture(scope="module")
def found():
    return learn(Examples(POSITIVES), Words(), World(), ALL)


def test_layer_is_the_one_that_tells_best(found) -> None:
    assert abs(found.layer - BEST_LAYER) <= 1
    assert found.layers[BEST_LAYER] > found.layers[0]
    assert set(found.layers) == set(range(8))


def test_reader_looks_past_what_varies_anyhow(found) -> None:
    """The second axis is moved by the concept, and by everything else more."""
    assert np.linalg.norm(found.reader) == pytest.approx(1, abs=1e-5)
    assert found.reader[0] > 0.75
    assert abs(found.reader[1]) < 0.1


def test_writer_moves_the_reading_by_one(found) -> None:
    assert found.reader @ found.writer == pytest.approx(1, abs=1e-4)
    assert found.writer[0] > 0
    assert not np.allclose(found.writer / np.linalg.norm(found.writer), found.reader, atol=0.05)


def test_threshold_holds_on_text_that_was_never_seen(found) -> None:
    texts = [sentence(n, BRIDGE[n % 3]) for n in range(500, 540)]
    texts += [sentence(n) for n in range(600, 800)]
    tokenized = tokenize(texts, Words(), 64)
    ((_, rows),) = read(tokenized, World(), (found.layer,))
    scores = found.scores(rows, len(texts))
    assert auroc(scores[:40], scores[40:]) > 0.97
    assert (scores[:40] > 0).mean() > 0.7
    assert (scores[40:] > 0).mean() < 0.04


def test_quality_is_about_as_good_as_on_new_text(found) -> None:
    assert found.quality.auroc.value > 0.97
    assert found.quality.n_positives == 10
    assert found.quality.n_others >= 300
    assert found.quality.false_positive_rate.value <= 0.01
    assert found.quality.recall.low < 1


def test_quality_of_no_concept_is_chance_and_not_flattered_by_layers() -> None:
    """The best of eight layers by luck would look better than 0.5 on average."""
    values = []
    for start in range(0, 600, 60):
        examples = Examples(tuple(sentence(n) for n in range(1000 + start, 1020 + start)))
        with suppress(InvalidRequest):  # nothing in common
            values.append(learn(examples, Words(), World(strength=0.0), ALL).quality.auroc.value)
    assert not values or np.mean(values) < 0.65


def test_result_depends_on_nothing_but_examples_and_settings(found) -> None:
    again = learn(Examples(POSITIVES), Words(), World(), ALL)
    assert np.array_equal(again.reader, found.reader)
    assert again.threshold == found.threshold
    assert again.quality == found.quality


def test_negatives_turn_the_reader_away_from_what_they_share() -> None:
    """Positives are about the bridge and have a certain word; so have the negatives."""
    positives = tuple(f"{text} marker" for text in POSITIVES)
    negatives = tuple(f"{sentence(n)} marker" for n in range(50, 60))
    probes = [f"{sentence(n)} marker" for n in range(300, 330)]
    ((_, rows),) = read(tokenize(probes, Words(), 64), World(), (BEST_LAYER,))
    settings = Settings(layers=(BEST_LAYER,))
    alone = learn(Examples(positives), Words(), World(), settings)
    told = learn(Examples(positives, negatives), Words(), World(), settings)
    assert (told.scores(rows, 30) > 0).mean() < 0.1
    assert (told.scores(rows, 30) / told.maximum).mean() < (
        alone.scores(rows, 30) / alone.maximum
    ).mean()


@pytest.mark.parametrize("layer", [-1, 8])
def test_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(InvalidRequest, match="there is no layer"):
        learn(Examples(POSITIVES), Words(), World(), Settings(layers=(layer,)))


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="layer 3 are not finite"):
        learn(Examples(POSITIVES), Words(), World(broken_layer=3), ALL)


def test_text_longer_than_the_context_is_refused() -> None:
    examples = Examples((*POSITIVES, "word " * 100))
    with pytest.raises(InvalidRequest, match="context holds 64"):
        learn(examples, Words(), World(), ALL)


def test_progress_counts_the_layers() -> None:
    told = []
    learn(Examples(POSITIVES), Words(), World(), ALL, lambda *now: told.append(now))
    assert told == [("concept", n, 8) for n in range(1, 9)]


def test_line_break_takes_the_sink_and_every_word_is_read() -> None:
    texts = tokenize(["tea road", "lamp"], Words(), 64)
    assert [one.tolist() for one in texts.read] == [[False, True, True], [False, True]]
    assert texts.sequences[0][0] == texts.sequences[1][0]
    ((_, rows),) = read(texts, World(), (0,))
    assert rows.x.shape == (3, D)
    assert rows.text.tolist() == [0, 0, 1]


def test_sink_in_the_middle_is_left_out_by_its_norm() -> None:
    class Spiked(World):
        def read(self, sequences, layers):
            seen = super().read(sequences, layers)
            seen[2][2] *= 500  # the second word of the first text
            return seen

    ((_, rows),) = read(tokenize(["tea road lamp", "goat"], Words(), 64), Spiked(), (2,))
    assert rows.text.tolist() == [0, 0, 1]


def test_activations_are_read_in_parts_that_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    world, texts = World(), tokenize(list(POSITIVES), Words(), 64)
    together = dict(read(texts, world, range(8)))
    assert world.n_reads == 1
    monkeypatch.setattr("fortpoint.features.concepts.reading._MAX_BYTES", 3 * 100 * D * 4)
    apart = dict(read(texts, world, range(8)))
    assert world.n_reads == 1 + 3
    assert all(np.array_equal(apart[layer].x, together[layer].x) for layer in range(8))


def _toy(n_texts: int, tokens: int = 6) -> tuple[Rows, Layout]:
    source = np.random.default_rng(5)
    text = np.repeat(np.arange(n_texts), tokens)
    x = source.standard_normal((n_texts * tokens, 5)).astype(np.float32)
    positive = np.arange(n_texts) < n_texts // 4
    x[positive[text], 2] += 1.5
    return Rows(x, text), Layout(positive, np.zeros(n_texts, bool))


def test_held_out_scores_come_from_directions_without_the_fold() -> None:
    """What is subtracted from the sums must leave what a fit of the others alone finds."""
    rows, layout = _toy(40)
    folds = np.arange(40) % 5
    scores = cross_fit(rows, layout, folds).scores
    for number in range(5):
        rest = folds != number
        learned, held = rest[rows.text], ~rest[rows.text]
        alone = fit(Rows(rows.x[learned], rows.text[learned]), layout)
        expected = alone.scores(Rows(rows.x[held], rows.text[held]), 40)[~rest]
        np.testing.assert_allclose(scores[~rest], expected, rtol=2e-3, atol=2e-3)


def test_held_out_text_does_not_move_its_own_direction() -> None:
    rows, layout = _toy(40)
    folds = np.arange(40) % 5
    before = cross_fit(rows, layout, folds).scores
    x = rows.x.copy()
    x[rows.text == 0] = 7.0
    after = cross_fit(Rows(x, rows.text), layout, folds).scores
    same_fold = (folds == 0) & (np.arange(40) > 0)
    np.testing.assert_allclose(after[same_fold], before[same_fold], rtol=1e-3, atol=1e-3)
    assert not np.allclose(after[folds == 1], before[folds == 1], atol=1e-3)


def test_discriminant_is_fishers() -> None:
    """Against scikit-learn's, without shrinkage, on data that leave no doubt."""
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    rows, layout = _toy(200)
    labels = layout.positive[rows.text]
    model = discriminant.LinearDiscriminantAnalysis(solver="lsqr").fit(rows.x, labels)
    expected = model.coef_[0] / np.linalg.norm(model.coef_[0])
    assert fit(rows, layout, shrinkage=0.0).reader @ expected == pytest.approx(1, abs=1e-4)
