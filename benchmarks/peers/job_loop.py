"""What every runner of a peer does: say that it is ready, then do one job a line.

    {"prompts": [[token, ...], ...], "concurrency": 8, "max_tokens": 128}      on standard input
    {"seconds": 3.2, "n_tokens": 1024}                                         on standard output

Prompts go in waves of ``concurrency``; a wave begins when the one before it has ended. What
libraries print goes to standard error, so that standard output holds results alone. Runs in
the peer's own environment: only the standard library may be imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

Prompt = list[int]
Generate = Callable[[Sequence[Prompt], int], int]


def settings() -> dict:
    """The runner's first argument."""
    return json.loads(sys.argv[1])


def reserve_output() -> Callable[[dict], None]:
    """Keep standard output for results; whatever else is printed goes to standard error."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(result: dict) -> None:
        results.write(json.dumps(result) + "\n")
        results.flush()

    return write


def serve(
    write: Callable[[dict], None],
    packages: Sequence[str],
    generate: Generate,
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Do jobs until standard input ends.

    ``generate(prompts, max_tokens)`` returns how many tokens it made; ``prepare(concurrency)``
    is not timed.
    """
    write({"versions": {name: metadata.version(name) for name in packages}})
    for line in sys.stdin:
        job = json.loads(line)
        if prepare is not None:
            prepare(job["concurrency"])
        start = time.perf_counter()
        n_tokens = sum(
            generate(wave, job["max_tokens"]) for wave in _waves(job["prompts"], job["concurrency"])
        )
        write({"seconds": time.perf_counter() - start, "n_tokens": n_tokens})


def _waves(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
