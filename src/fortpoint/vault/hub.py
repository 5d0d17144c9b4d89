"""Models from a Hugging Face hub: ``hf:organisation/name``, or ``hf:organisation/name@revision``.

1. the revision (a branch, a tag; the main branch when none is given) becomes a commit;
2. of that commit's files those that make a model are chosen by name (``layout.py``);
3. each is downloaded from the commit, its size and its SHA-256 compared with the hub's list;
4. the commit goes into the manifest, so that the same model can be had again.

``HubClient`` is the seam: ``huggingface_hub`` behind it knows mirrors, tokens and proxies from
its own environment variables (``HF_ENDPOINT``, ``HF_TOKEN``).

Not protected here: the hub itself. It says what the digests are; only a commit that somebody has
looked at, named after ``@``, pins what is in it.
"""

from __future__ import annotations

import hmac
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fortpoint.errors import DigestMismatch, ModelError
from fortpoint.vault import layout
from fortpoint.vault.model_folder import sha256_of

PREFIX = "hf:"
_SOURCE = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][\w./-]{0,127}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """What a hub says of one revision: ``sizes`` in bytes, ``sha256`` of large files in hex."""

    commit: str
    license: str
    sizes: dict[str, int]
    sha256: dict[str, str]


class HubClient(Protocol):
    def look_up(self, repository: str, revision: str | None) -> Repository:
        """Raises ``ModelError``."""

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        """The file, somewhere below ``folder``. Raises ``ModelError``."""


@dataclass(frozen=True)
class HubSource:
    """A repository on a hub, perhaps at a revision."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Of ``hf:organisation/name[@revision]``. Raises ``ModelError``."""
        match = _SOURCE.fullmatch(source)
        if match is None or ".." in source:
            raise ModelError(f"{source[:200]!r} is not of the form hf:organisation/name@revision")
        return cls(match["repository"], match["revision"])

    @property
    def name(self) -> str:
        """What the model is called unless it is told otherwise."""
        return self.repository.partition("/")[2].lower()


def fetch(
    source: HubSource,
    client: HubClient,
    folder: Path,
    scratch: Path,
    progress: Callable[[int, int], None],
) -> Repository:
    """Put the model's files into ``folder``. Raises ``ModelError`` or ``DigestMismatch``."""
    found = client.look_up(source.repository, source.revision)
    if not _COMMIT.fullmatch(found.commit):
        raise ModelError("the hub does not say which commit this is")
    chosen = layout.choose(found.sizes)
    total, done = sum(chosen.values()), 0
    layout.check_room(total, folder)
    for name, n_bytes in chosen.items():
        progress(done, total)
        path = client.download(source.repository, found.commit, name, scratch / "hub")
        _check(path, name, n_bytes, found.sha256.get(name))
        shutil.move(path, folder / name)
        done += n_bytes
    progress(total, total)
    return found


def _check(path: Path, name: str, n_bytes: int, sha256: str | None) -> None:
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{name} did not arrive as a file")
    same = path.stat().st_size == n_bytes
    if not same or (sha256 and not hmac.compare_digest(sha256_of(path), sha256)):
        raise DigestMismatch(f"{name} is not the file that the hub lists; nothing was kept")
    if name.endswith(".safetensors") and not sha256:
        raise ModelError(f"the hub gives no digest for {name}")


class HuggingFaceHub:
    """``huggingface_hub`` as a ``HubClient``."""

    def look_up(self, repository: str, revision: str | None) -> Repository:
        from huggingface_hub import HfApi

        info: Any = _asking(
            repository,
            lambda: HfApi().model_info(repository, revision=revision, files_metadata=True),
        )
        files = info.siblings or []
        card = getattr(info, "card_data", None)
        license_id = card.get("license") if card is not None else None
        return Repository(
            commit=info.sha or "",
            license=license_id if isinstance(license_id, str) else "unknown",
            sizes={file.rfilename: file.size for file in files if file.size is not None},
            sha256={file.rfilename: file.lfs.sha256 for file in files if file.lfs},
        )

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        import huggingface_hub

        library: Any = huggingface_hub  # its annotations are partial
        library.utils.disable_progress_bars()
        path = _asking(
            repository,
            lambda: library.hf_hub_download(repository, name, revision=commit, local_dir=folder),
        )
        return Path(str(path))


def _asking(repository: str, ask: Callable[[], object]) -> object:
    import httpx  # what huggingface_hub speaks with

    try:
        return ask()
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ModelError(
            f"the hub does not give {repository}: {type(error).__name__}. Check the name and the "
            "network; a repository that asks for consent needs HF_TOKEN in the environment"
        ) from None
