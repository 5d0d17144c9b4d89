"""Reads the residual stream for each row through the product's own forward pass, once.

The cache is a folder of shards outside the repository; a run that stops is continued by the
next. A shard holds, for each text: means over windows of ``WINDOW_TOKENS`` tokens of the
user's segment and the template's last token after it, each ``x / rms(x)`` for the residual
stream ``x`` after every layer of ``LAYERS``.

    cache = Cache(Path(".bench/guard/readings"))
    harvest(rows, cache, Path("~/.fortpoint/models/smollm2-135m").expanduser())
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.kv_cache import KVCache
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Floats, Span, Step
from fortpoint.guard.training.probes import WINDOW_TOKENS, Activations
from fortpoint.types import Message, Role
from training.rows import Row

LAYERS = (6, 9, 12, 15, 18, 21, 24, 27)
MAX_TOKENS = 80
LONG_TOKENS = 192  # of one row in eight, and so of what long prompts look like
SHARD_ROWS = 384
BATCH_TOKENS = 1536
THREADS = os.cpu_count() or 1

# None is the template's own system prompt. Three in ten rows have another one, so that the
# probes do not depend on it.
SYSTEMS: tuple[str | None, ...] = (
    *(None,) * 7,
    "You are a helpful assistant.",
    "You are the support assistant of a shop. Be brief and polite.",
    "You are an expert programmer. Answer with working code and short explanations.",
)

Float16 = NDArray[np.float16]


class Cache:
    """Shards in ``folder``; keys are ``Row.key``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keys(self) -> set[str]:
        found: set[str] = set()
        for file in self._shards():
            with np.load(file) as shard:
                found.update(shard["keys"].tolist())
        return found

    def load(self) -> dict[str, Activations]:
        found = {}
        for file in self._shards():
            with np.load(file) as shard:
                ends = np.cumsum(shard["nwin"])
                windows, tail, n = shard["windows"], shard["tail"], shard["n"]
                for i, key in enumerate(shard["keys"].tolist()):
                    start = ends[i] - shard["nwin"][i] if i else 0
                    found[key] = Activations(windows[start : ends[i]], tail[i], int(n[i]))
        return found

    def add(self, read: dict[str, Activations]) -> None:
        name = hashlib.sha256("".join(read).encode()).hexdigest()[:16]
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            np.savez(
                file,
                keys=np.array(list(read)),
                windows=np.concatenate([a.windows for a in read.values()]),
                nwin=np.array([len(a.windows) for a in read.values()]),
                tail=np.stack([a.tail for a in read.values()]),
                n=np.array([a.n_tokens for a in read.values()]),
            )
        os.replace(partial, self.folder / f"{name}.npz")

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))


@dataclass(frozen=True)
class _Item:
    key: str
    system: str | None
    text: tuple[int, ...]


class Reader:
    """Runs the embedded model over prompts that share a beginning."""

    def __init__(self, folder: Path) -> None:
        self._model = Llama.load(
            folder, precision.choose("auto"), max_context=1024, kv_bytes=1 << 29, threads=THREADS
        )
        self._tokenizer = ChatTokenizer.load(folder)
        self._prefixes: dict[str | None, KVCache] = {}
        self.tail = self._template(None)[1]

    def item(self, row: Row) -> _Item:
        long = row.hidden or int(row.key[6:8], 16) % 8 == 0
        limit = LONG_TOKENS if long else MAX_TOKENS
        text = self._tokenizer.encode_text(row.text[:4000])[:limit]
        return _Item(
            row.key,
            SYSTEMS[int(row.key[:6], 16) % len(SYSTEMS)],
            tuple(text or self._tokenizer.encode_text(" ")),
        )

    def read(self, items: Sequence[_Item]) -> Iterator[Activations]:
        """Activations in the order of ``items``, in one forward pass."""
        spans, tokens = [], []
        for item in items:
            cache = self._fork(item)
            own = [*item.text, *self.tail]
            spans.append(Span(cache, len(tokens), len(tokens) + len(own)))
            tokens.extend(own)
        step = Step(tokens, spans, tap_layers=LAYERS, last_layer=LAYERS[-1])
        seen = self._model.forward(step).seen
        x = np.stack([_unit(seen[layer]) for layer in LAYERS], axis=1)  # [n_rows, n_layers, d]
        for item, span in zip(items, spans, strict=True):
            span.cache.release()
            end = span.start + len(item.text)
            yield Activations(
                np.stack([_mean(part) for part in _windows(x[span.start : end])]),
                x[span.end - 1].astype(np.float16),
                len(item.text),
            )

    def _fork(self, item: _Item) -> KVCache:
        if item.system not in self._prefixes:
            head = self._template(item.system)[0]
            cache = self._model.new_cache()
            cache.reserve(len(head))
            spans = [Span(cache, 0, len(head))]
            self._model.forward(Step(head, spans, last_layer=LAYERS[-1]))
            self._prefixes[item.system] = cache
        fork = self._prefixes[item.system].fork()
        if fork is None or not fork.reserve(fork.length + len(item.text) + len(self.tail)):
            raise MemoryError("no room for a batch")
        return fork

    def _template(self, system: str | None) -> tuple[list[int], list[int]]:
        """Tokens before and after the user's text."""
        messages = [Message(Role.USER, "x")]
        if system is not None:
            messages.insert(0, Message(Role.SYSTEM, system))
        prompt = self._tokenizer.chat(messages)
        user = next(s for s in prompt.segments if s.role is Role.USER)
        return list(prompt.tokens[: user.start]), list(prompt.tokens[user.end :])


def harvest(rows: Sequence[Row], cache: Cache, folder: Path) -> None:
    """Read every row that the cache lacks. Prints a line a shard."""
    done = cache.keys()
    missing = [row for row in _in_turn(rows) if row.key not in done]
    if not missing:
        return
    reader = Reader(folder)
    started, n_tokens = time.monotonic(), 0
    for start in range(0, len(missing), SHARD_ROWS):
        items = sorted(
            (reader.item(row) for row in missing[start : start + SHARD_ROWS]),
            key=lambda item: len(item.text),
        )
        read: dict[str, Activations] = {}
        for batch in _batches(items, len(reader.tail)):
            read.update(zip([i.key for i in batch], reader.read(batch), strict=True))
        cache.add(read)
        n_tokens += sum(len(item.text) + len(reader.tail) for item in items)
        rate = n_tokens / (time.monotonic() - started)
        print(f"read {start + len(items)}/{len(missing)} texts, {rate:.0f} tokens/s", flush=True)


def _in_turn(rows: Sequence[Row]) -> list[Row]:
    """A row of each set in turn, so that a run that stops has read much of what there is."""
    turns: Counter[tuple[str, str]] = Counter()
    ranked = []
    for row in {row.key: row for row in rows}.values():
        turns[row.dataset, row.label] += 1
        ranked.append((turns[row.dataset, row.label], row))
    return [row for _, row in sorted(ranked, key=lambda one: one[0])]


def _batches(items: Sequence[_Item], n_tail: int) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    n_tokens = 0
    for item in items:
        n_own = len(item.text) + n_tail
        if batch and n_tokens + n_own > BATCH_TOKENS:
            yield batch
            batch, n_tokens = [], 0
        batch.append(item)
        n_tokens += n_own
    if batch:
        yield batch


def _unit(x: Floats) -> Floats:
    scale: Floats = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * scale


def _windows(x: Floats) -> list[Floats]:
    return [x[start : start + WINDOW_TOKENS] for start in range(0, len(x), WINDOW_TOKENS)]


def _mean(x: Floats) -> Float16:
    return x.mean(0).astype(np.float16)
