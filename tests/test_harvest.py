"""A harvest is whole or goes on, and refuses what it cannot make anything of."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harvested
import tiny_model
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.errors import InvalidRequest, ModelError, NotFound, StorageError
from fortpoint.features import corpus, harvest
from fortpoint.features.activations import ActivationStore, narrow, widen
from fortpoint.features.corpus import ROLES, Document
from fortpoint.types import Role

D = 8


class Stream:
    """Residuals that say which token they are of; counts what it is asked."""

    d_model = D
    max_context = 256
    n_layers = 3

    def __init__(self) -> None:
        self.n_read = 0
        self.stop_after: int | None = None
        self.value = 1.0

    def check_layers(self, layers: Sequence[int]) -> None:
        if any(layer >= self.n_layers for layer in layers):
            raise InvalidRequest("there is no layer")

    def read(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Any]:
        if self.stop_after is not None and self.n_read >= self.stop_after:
            raise KeyboardInterrupt
        tokens = np.array([token for sequence in sequences for token in sequence], np.float32)
        self.n_read += len(tokens)
        return {
            layer: self.value * np.outer(tokens + layer, np.ones(D, np.float32)) for layer in layers
        }


def documents(n: int = 200, length: int = 300) -> list[Document]:
    random = np.random.default_rng(0)
    return [
        Document(random.integers(1, 100, length).astype(np.int32), np.full(length, 1, np.uint8))
        for _ in range(n)
    ]


def settings(**changes: Any) -> harvest.Settings:
    return harvest.Settings(**{"layers": (1,), "context": 128, "shard_tokens": 8192, **changes})


def run(folder: Path, stream: Stream, **changes: Any) -> ActivationStore:
    plan, windows = harvest.prepare(documents(), settings(**changes), stream, "tiny", "sha256:0")
    return harvest.harvest(folder, plan, windows, stream, lambda *_: None)


def contents(store: ActivationStore) -> list[bytes]:
    return [
        path.read_bytes() for shard in store.shards for path in sorted(shard.path.glob("*.npy"))
    ]


def test_harvest_keeps_every_token_with_its_place(tmp_path: Path) -> None:
    store = run(tmp_path / "h", Stream(), layers=(1, 2))
    assert store.n_tokens == store.plan.n_tokens == 200 * 300
    shard = store.shards[0]
    np.testing.assert_allclose(widen(shard.bits(2))[:, 0], shard.tokens + 2, rtol=0.004)
    assert shard.position.max() == 127
    assert {ROLES[role] for role in np.unique(shard.role)} == {Role.USER}
    np.testing.assert_allclose(shard.norm(1), (shard.tokens + 1) * D**0.5, rtol=0.01)


def test_harvest_that_was_interrupted_goes_on_and_equals_the_whole(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Stream())
    stream = Stream()
    stream.stop_after = 30_000
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "h", stream)
    n_there = len(ActivationStore(tmp_path / "h").shards)
    assert 0 < n_there < len(whole.shards)
    later = Stream()
    store = run(tmp_path / "h", later)
    assert later.n_read == whole.n_tokens - sum(len(s) for s in whole.shards[:n_there])
    assert contents(store) == contents(whole)


def test_harvest_of_other_text_or_settings_is_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path / "h", Stream())
    with pytest.raises(ModelError, match="another model, corpus or setting"):
        run(tmp_path / "h", Stream(), context=64)


def test_harvest_keeps_to_its_byte_budget(tmp_path: Path) -> None:
    store = run(tmp_path / "h", Stream(), max_bytes=1_000_000)
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "h").rglob("*.npy"))
    assert 20_000 <= store.n_tokens < 60_000
    assert n_bytes < 1_100_000


def test_harvest_of_too_little_text_is_refused(tmp_path: Path) -> None:
    few = documents(3)
    with pytest.raises(InvalidRequest, match="at least"):
        harvest.prepare(few, settings(), Stream(), "tiny", "sha256:0")


@pytest.mark.parametrize("changes", [{"layers": (7,)}, {"layers": ()}, {"layers": (1, 1)}])
def test_harvest_of_layers_that_are_not_there_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        harvest.prepare(documents(), settings(**changes), Stream(), "tiny", "sha256:0")


@pytest.mark.parametrize("context", [1, 257])
def test_harvest_with_a_context_that_does_not_fit_is_refused(context: int) -> None:
    with pytest.raises(InvalidRequest, match="context"):
        harvest.prepare(documents(), settings(context=context), Stream(), "tiny", "sha256:0")


def test_harvest_of_activations_that_are_not_finite_leaves_no_shard(tmp_path: Path) -> None:
    stream = Stream()
    stream.value = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        run(tmp_path / "h", stream)
    assert not list((tmp_path / "h").glob("shard-*"))


def test_harvest_on_a_full_disk_leaves_no_half_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = np.save, []

    def full(path: Path, array: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        run(tmp_path / "h", Stream())
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "h").glob("shard-*")] == ["shard-00000"]
    assert contents(run(tmp_path / "h", Stream())) == contents(run(tmp_path / "w", Stream()))


def test_store_of_a_folder_without_a_harvest_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="features harvest"):
        ActivationStore(tmp_path)


def test_store_with_a_gap_is_refused(tmp_path: Path) -> None:
    store = harvested.store(tmp_path / "h")
    shutil.rmtree(store.shards[2].path)
    with pytest.raises(ModelError, match="lacks a shard"):
        ActivationStore(tmp_path / "h")


def test_shard_with_a_damaged_array_says_what_to_do(tmp_path: Path) -> None:
    store = harvested.store(tmp_path / "h", n_shards=2)
    (store.shards[1].path / "tokens.npy").write_bytes(b"\x93NUMPY no array")
    with pytest.raises(ModelError, match="delete shard-00001"):
        len(ActivationStore(tmp_path / "h").shards[1])


def test_kept_leaves_first_tokens_and_great_norms_out(tmp_path: Path) -> None:
    store = harvested.store(tmp_path / "h", n_shards=2)
    kept = store.kept(store.shards[0], harvested.LAYER)
    assert (store.shards[0].position[kept] > 0).all()
    assert store.shards[0].norm(harvested.LAYER)[kept].max() < 100
    assert len(kept) == 2048 - 32


def test_split_keeps_the_last_shards_and_refuses_to_keep_all(tmp_path: Path) -> None:
    store = harvested.store(tmp_path / "h", n_shards=3)
    learn, held_out = store.split(1)
    assert (learn, held_out) == (store.shards[:2], store.shards[2:])
    with pytest.raises(ModelError, match="harvest more"):
        store.split(3)


def test_narrow_rounds_to_the_nearest_and_widen_gives_it_back() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 100
    expected = torch.tensor(x).bfloat16()
    np.testing.assert_array_equal(narrow(x), expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(widen(narrow(x)), expected.float().numpy())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_model.make(tmp_path_factory.mktemp("t") / "tiny"))


def test_corpus_reads_texts_and_conversations_with_their_roles(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    lines = [{"text": "some text", "source": "x"}, {"messages": chat}]
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n\n".join(json.dumps(line).encode() for line in lines)))
    read = corpus.read([path], tokenizer)
    assert len(read) == 2
    said = next(one for one in read if len(one) > 9)
    roles = [ROLES[role] for role in said.roles]
    text = "".join(
        tokenizer.decode([int(token)])
        for token, role in zip(said.tokens, roles, strict=True)
        if role is Role.ASSISTANT
    )
    assert text == "yes"
    assert roles.count(Role.USER) == 5
    assert Role.TEMPLATE in roles


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"text": "a", "messages": []}',
        b'{"messages": []}',
        b'{"messages": [{"role": "template", "content": "x"}]}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_corpus_refuses_a_line_that_is_none_and_says_where(
    tmp_path: Path, tokenizer: ChatTokenizer, line: bytes
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        corpus.read([path], tokenizer)


def test_corpus_refuses_files_that_cannot_be_read(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        corpus.read([tmp_path / "nothing.jsonl"], tokenizer)
    damaged = tmp_path / "d.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        corpus.read([damaged], tokenizer)


def test_corpus_refuses_a_line_without_end(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 100)
    path = tmp_path / "c.jsonl"
    path.write_bytes(json.dumps({"text": "a" * 200}).encode())
    with pytest.raises(InvalidRequest, match="longer than"):
        corpus.read([path], tokenizer)
