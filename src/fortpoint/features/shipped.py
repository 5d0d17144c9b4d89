"""Dictionaries that come with the product, each made for the weights of one model.

    artefacts/
      smollm2-135m-l15/model.json     {"model": "smollm2-135m", "digest": "sha256:..."}
                       cfg.json, sae_weights.safetensors, feature_stats.safetensors

    library = Library.load(home.features, d_model, n_layers, made_for(digest))

A dictionary means nothing in another model, also in one of the same shape, so that only the
digest decides: with other weights the dictionary is absent. What lies in the home under the
same name takes its place. Not protected here: the files themselves; they are as safe as the
package that they lie in.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from fortpoint.errors import ModelError

ARTEFACTS = Path(__file__).parent / "artefacts"
MODEL = "model.json"

_MAX_BYTES = 4096


class MadeFor(msgspec.Struct, frozen=True):
    """The model that a dictionary was trained in: its name, and the digest of its weights."""

    model: str
    digest: str


def made_for(digest: str, folder: Path = ARTEFACTS) -> tuple[Path, ...]:
    """The dictionaries for the model of this digest, by name; none where ``folder`` is absent.

    Raises ``ModelError`` for one that does not say which model it was made for.
    """
    found = sorted(folder.glob(f"*/{MODEL}"))
    return tuple(path.parent for path in found if read(path).digest == digest)


def read(path: Path) -> MadeFor:
    """A dictionary's ``model.json``. Raises ``ModelError``."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ModelError(f"{path.parent.name}/{MODEL} is larger than {_MAX_BYTES} bytes")
        return msgspec.json.decode(text, type=MadeFor)
    except OSError as error:
        raise ModelError(
            f"{path.parent.name}/{MODEL} cannot be read: {error.strerror or error}"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelError(
            f"{path.parent.name}/{MODEL} does not name a model and its digest"
        ) from None
