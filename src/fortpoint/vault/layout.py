"""Hugging Face's layout: which files of a folder or repository make a model, and which never.

    config.json  tokenizer.json  tokenizer_config.json ...    what the engine reads as text
    model.safetensors                                          or
    model-00001-of-00003.safetensors ...  model.safetensors.index.json

Everything else is left where it is, above all pickles (``.bin``, ``.pt``) and code (``.py``).
Files are taken by name from the top of the folder alone, each of a limited size.

Not protected here: what is in the files. The engine reads them in its sandbox, and refuses what
does not fit.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from fortpoint.errors import ModelError

MAX_TEXT_BYTES = 128 * 1024 * 1024
MAX_WEIGHTS_BYTES = 1 << 41
MAX_FILES = 2048

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TEXT = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json|tokenizer\.json"
    r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|chat_template\.(json|jinja)|merges\.txt|vocab\.txt|tokenizer\.model"
)
_NEEDED = ("config.json", "tokenizer.json")


def choose(sizes: Mapping[str, int]) -> dict[str, int]:
    """The files that make the model, by name, with their bytes. Raises ``ModelError``."""
    chosen = {name: n for name, n in sizes.items() if _WEIGHTS.fullmatch(name)}
    if not chosen:
        raise ModelError(
            "there are no weights in safetensors (model.safetensors); other formats are not read"
        )
    chosen |= {name: n for name, n in sizes.items() if _TEXT.fullmatch(name)}
    if missing := [name for name in _NEEDED if name not in chosen]:
        raise ModelError(f"there is no {missing[0]}, which a model needs")
    if len(chosen) > MAX_FILES or sum(chosen.values()) > MAX_WEIGHTS_BYTES:
        raise ModelError(f"it is larger than {MAX_WEIGHTS_BYTES} bytes or {MAX_FILES} files")
    for name, n_bytes in chosen.items():
        if _TEXT.fullmatch(name) and n_bytes > MAX_TEXT_BYTES:
            raise ModelError(f"{name} is larger than {MAX_TEXT_BYTES} bytes")
    return dict(sorted(chosen.items()))


def check_room(n_bytes: int, folder: Path) -> None:
    """Raises ``ModelError`` when the disk of ``folder`` cannot hold as much."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ModelError(f"the model has {n_bytes >> 20} MiB, and only {free >> 20} MiB are free")


def copy(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy the model's files out of the folder ``source``. Links are refused, never followed."""
    chosen = choose(_sizes(source))
    total, done = sum(chosen.values()), 0
    check_room(total, target)
    for name, n_bytes in chosen.items():
        progress(done, total)
        _copy_file(source / name, target / name, n_bytes)
        done += n_bytes
    progress(total, total)


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.iterdir():
        about = path.lstat()
        if stat.S_ISREG(about.st_mode):
            sizes[path.name] = about.st_size
        elif stat.S_ISLNK(about.st_mode) and (
            _WEIGHTS.fullmatch(path.name) or _TEXT.fullmatch(path.name)
        ):
            raise ModelError(
                f"{path.name} is a link; copy the folder with `cp -rL` first, so that the model "
                "is what lies in it"
            )
    return sizes


def _copy_file(source: Path, target: Path, n_bytes: int) -> None:
    """``n_bytes`` of a regular file that is still one when it is opened."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream, target.open("xb") as written:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size != n_bytes:
            raise ModelError(f"{source.name} changed while it was read")
        shutil.copyfileobj(stream, written, 4 * 1024 * 1024)
        if written.tell() != n_bytes:
            raise ModelError(f"{source.name} changed while it was read")
