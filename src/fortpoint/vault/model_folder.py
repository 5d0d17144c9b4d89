"""A model on disk: a folder in Hugging Face's layout and the manifest that pins its bytes.

    models/smollm2-135m/
        config.json  tokenizer.json  tokenizer_config.json  model.safetensors
        manifest.json      {"name", "source", "license", "created", "files": {name: sha256}}

The model's digest is the SHA-256 of the manifest's ``files`` in canonical JSON, so it names
every byte that the engine reads. ``open_model`` recomputes it. Not protected here: someone
who can write the folder can write the manifest too; sealing is the vault's later work.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fortpoint.errors import DigestMismatch, ModelError

MANIFEST = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``files`` maps each file's name to its SHA-256 in hex; ``created`` is Unix seconds."""

    name: str
    source: str
    license: str
    created: int
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` over all files."""
        canonical = json.dumps(self.files, sort_keys=True, separators=(",", ":")).encode()
        return "sha256:" + hashlib.sha256(canonical).hexdigest()


class ModelFolder(msgspec.Struct, frozen=True):
    path: Path
    manifest: Manifest


def models_dir(home: Path) -> Path:
    return home / "models"


def model_path(home: Path, name: str) -> Path:
    """Where the model of this name lies. Raises ``ModelError`` for a name that is none."""
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name[:64]!r} is no model name: use lower-case letters, digits, '.', '_' and '-'"
        )
    return models_dir(home) / name


def list_models(home: Path) -> Iterator[ModelFolder]:
    """Every model of this home, by name, without reading the weights."""
    for manifest in sorted(models_dir(home).glob(f"*/{MANIFEST}")):
        yield ModelFolder(manifest.parent, read_manifest(manifest.parent))


def open_model(path: Path) -> ModelFolder:
    """The model at ``path``, its files' digests checked against the manifest.

    Raises ``ModelError`` when it is absent or malformed, ``DigestMismatch`` when a byte differs.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise ModelError(f"the manifest of {path.name} names a file outside its folder")
        if sha256_of(path / name) != expected:
            raise DigestMismatch(
                f"{name} of model {path.name} is not the file that was pulled; "
                f"remove it with `fortpoint model rm {path.name}` and pull it again"
            )
    return ModelFolder(path, manifest)


def write_manifest(path: Path, name: str, source: str, license_id: str, created: int) -> Manifest:
    """Pin every file that lies in ``path`` now."""
    files = {file.name: sha256_of(file) for file in sorted(path.iterdir()) if file.is_file()}
    manifest = Manifest(name, source, license_id, created, files)
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest


def remove_model(home: Path, name: str) -> None:
    path = model_path(home, name)
    if not (path / MANIFEST).is_file():
        raise ModelError(f"no model {name!r} here; `fortpoint model list` names them")
    shutil.rmtree(path)


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file.name}: {error.strerror}") from None


def read_manifest(path: Path) -> Manifest:
    """What the folder says it is. Raises ``ModelError`` for no manifest or a damaged one."""
    try:
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ModelError(
            f"model {path.name!r} is not here; fetch it with `fortpoint model pull {path.name}`"
        ) from None
    except (OSError, msgspec.MsgspecError):
        raise ModelError(f"the manifest of model {path.name} is damaged; pull it again") from None
