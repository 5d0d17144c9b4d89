"""Sealing and opening in gigabytes a second, and the memory that they take.

    python benchmarks/seal.py [--gib 1] [--repeats 5] [--folder /dev/shm]

A model of random bytes is sealed and opened in ``--folder`` (in memory, so that no disk is timed);
the best of the repeats counts. ``read`` gives the weights' file as one array, ``verify`` keeps
nothing. Sealing takes the SHA-256 of what it reads, by one thread; ``sha256`` is that alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fortpoint.vault.key_encryption import PassphraseFile
from fortpoint.vault.model_folder import write_manifest
from fortpoint.vault.open_sealed import SealedModel
from fortpoint.vault.seal import seal_model
from fortpoint.vault.sealed_folder import sealed_path
from fortpoint.vault.tensor_writer import write

ROOT = Path(__file__).resolve().parent.parent
ROWS = 4096


def model(home: Path, n_bytes: int) -> Path:
    folder = home / "models" / "random"
    folder.mkdir(parents=True)
    matrix = np.random.default_rng(0).standard_normal((n_bytes // 4 // ROWS, ROWS), np.float32)
    write(folder / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": matrix})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, "random", "benchmarks/seal.py", "none", 0)
    return folder


def best(work: Callable[[], object], repeats: int, n_bytes: int) -> float:
    """Gigabytes a second of the fastest."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return n_bytes / min(times) / 1e9


def peak_mib() -> float:
    """Most memory of this process since ``reset``, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(home: Path, n_bytes: int, repeats: int) -> dict[str, float]:
    folder = model(home, n_bytes)
    passphrase = home / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(secrets.token_hex(16))
    kek, target = PassphraseFile(passphrase), sealed_path(home, "random")

    def seal() -> None:
        shutil.rmtree(target, ignore_errors=True)
        seal_model(folder, home, kek)

    def digest() -> None:
        with (folder / "model.safetensors").open("rb") as file:
            hashlib.file_digest(file, "sha256")

    figures = {"sha256": best(digest, repeats, n_bytes)}
    reset()
    figures["seal"] = best(seal, repeats, n_bytes)
    figures["seal_peak_mib"] = peak_mib()
    with SealedModel.open(target, kek) as opened:
        reset()
        figures["verify"] = best(opened.verify, repeats, n_bytes)
        figures["verify_peak_mib"] = peak_mib()
        size = opened.size("model.safetensors")
        read = lambda: opened.read("model.safetensors", 0, size)  # noqa: E731
        figures["read"] = best(read, repeats, n_bytes)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))  # noqa: S108
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        figures = measure(Path(home), int(options.gib * (1 << 30)), options.repeats)
    load = os.getloadavg()[0]
    print(json.dumps({"commit": commit, "gib": options.gib, "load": load, **figures}))


if __name__ == "__main__":
    main()
