"""Which code computes a model: the fast path where it can, ``transformers`` where it must.

    model = load_model(folder, config)
    adapters = load_adapters(Path("adapters"), folder, model)

Not protected here: whether the folder is the model that it says it is; ``open_model`` of the
vault has looked at every byte before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fortpoint.config import Engine
from fortpoint.engine.architecture import Architecture, lacking, read_config
from fortpoint.engine.lora import Adapters
from fortpoint.engine.model import Model
from fortpoint.errors import ModelError

_MIB = 1024 * 1024


def load_model(folder: Path, config: Engine) -> Model:
    """The model in ``folder`` as configuration wants it. Raises ``ModelError``."""
    threads = config.threads or os.cpu_count() or 1
    kv_bytes = config.kv_cache_mib * _MIB
    reason = lacking(read_config(folder))
    if reason is not None:
        from fortpoint.engine.transformers_model import TransformersModel

        print(f"engine: transformers computes this model: {reason}", file=sys.stderr, flush=True)
        return TransformersModel.load(folder, config.dtype, config.max_context, kv_bytes, threads)
    from fortpoint.engine import precision
    from fortpoint.engine.llama import Llama

    chosen = precision.choose(config.dtype)
    return Llama.load(folder, chosen, config.max_context, kv_bytes, threads)


def load_adapters(
    folder: Path, model_folder: Path, model: Model, base_digest: str | None = None
) -> Adapters:
    """Adapters in ``folder`` that fit the loaded model; see ``Adapters.load``."""
    from fortpoint.engine.llama import Llama

    if isinstance(model, Llama):
        return Adapters.load(folder, Architecture.load(model_folder), base_digest)
    raise ModelError(f"a model of the architecture {model.architecture!r} takes no adapters")
