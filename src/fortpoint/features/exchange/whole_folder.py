"""A folder that appears when all of it is written, or never.

    with whole_folder(target) as partial:
        (partial / "cfg.json").write_bytes(...)

Not protected here: a machine that dies between the two renames of a replacement; then the old
folder is beside the place, under the name ``.<name>.old``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortpoint.errors import InvalidRequest, StorageError


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to fill; it takes that name when the block ends without error.

    With ``replace``, a folder that is there is kept until then, and goes. Raises
    ``InvalidRequest`` when something is there that is not to be replaced, ``StorageError`` when
    it cannot be written; then nothing new is left, and all old.
    """
    there = target.is_symlink() or target.exists()
    if there and not (replace and target.is_dir() and not target.is_symlink()):
        raise InvalidRequest(f"{target.name} is there already; choose another name or delete it")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir(parents=True, mode=0o700)
        yield partial
        if there:
            _exchange(partial, target)
        else:
            partial.rename(target)
    except OSError as error:
        raise StorageError(
            f"cannot write {target.name}: {error.strerror or error}; make room or choose another "
            "place, then do it again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
