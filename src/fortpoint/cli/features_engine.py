"""An engine of the operator's own, in this process: for harvesting and measuring.

with opened("smollm2-135m") as engine:
    engine.stream.read([[1, 2, 3]], layers=(15,))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fortpoint.errors import ModelError

if TYPE_CHECKING:
    from fortpoint.engine.chat import ChatTokenizer
    from fortpoint.engine.residual_stream import ResidualStream
    from fortpoint.features.activations import ActivationStore
    from fortpoint.vault.model_folder import ModelFolder

_GIB = 1 << 30


@dataclass(frozen=True)
class Harvesting:
    """What to harvest; ``tokens`` 0 takes all text there is."""

    layers: tuple[int, ...]
    tokens: int = 0
    context: int = 512
    max_gib: float = 32.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class OwnEngine:
    """A model with its tokenizer and residual stream."""

    model: ModelFolder
    tokenizer: ChatTokenizer
    stream: ResidualStream

    @property
    def name(self) -> str:
        return self.model.manifest.name

    @property
    def digest(self) -> str:
        return self.model.manifest.digest

    def harvest(
        self,
        texts: Sequence[Path],
        wish: Harvesting,
        folder: Path,
        progress: Callable[[str, int, int], None],
    ) -> ActivationStore:
        """Raises ``InvalidRequest``, ``ModelError`` and ``StorageError``, each saying why."""
        from fortpoint.features import corpus, harvest

        n_tokens = wish.tokens or None
        self.stream.check_layers(wish.layers)
        documents = corpus.read(texts, self.tokenizer, wish.seed, n_tokens)
        settings = harvest.Settings(
            layers=wish.layers,
            context=wish.context,
            n_tokens=n_tokens,
            max_bytes=int(wish.max_gib * _GIB),
            seed=wish.seed,
        )
        plan, windows = harvest.prepare(documents, settings, self.stream, self.name, self.digest)
        return harvest.harvest(folder, plan, windows, self.stream, progress)


def check_digest(model: ModelFolder, digest: str) -> None:
    """Raises ``ModelError`` when this is not the model that was harvested."""
    if model.manifest.digest != digest:
        raise ModelError(
            f"the model {model.manifest.name} is not the one that was harvested; pull it again "
            "or harvest anew"
        )


def _model(name: str | None) -> ModelFolder:
    from fortpoint import config as configuration
    from fortpoint.vault.model_folder import model_path, open_model

    config = configuration.load()
    return open_model(model_path(config.home_path, name or config.engine.model))


@contextmanager
def opened(name: str | None = None) -> Iterator[OwnEngine]:
    """The model of this name, or the configured one. Raises ``ModelError``."""
    from fortpoint import config as configuration
    from fortpoint.engine.chat import ChatTokenizer
    from fortpoint.engine.loading import load_model
    from fortpoint.engine.residual_stream import ResidualStream

    folder = _model(name)
    model = load_model(folder.path, configuration.load().engine)
    try:
        yield OwnEngine(folder, ChatTokenizer.load(folder.path), ResidualStream(model))
    finally:
        model.close()
