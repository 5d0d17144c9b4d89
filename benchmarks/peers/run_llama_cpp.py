"""llama.cpp's server (xllamacpp), asked from one thread a request, greedy, end ignored.

    python run_llama_cpp.py '{"gguf": FILE, "threads": 2, "context": 1024, "poll": 50}'

The server is made anew, outside the time taken, with as many slots as a job has requests at
once: slots that stay empty would cost it. ``context`` is a slot's, in tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from job_loop import Prompt, reserve_output, serve, settings
from xllamacpp import CommonParams, Server

BATCH = 2048


class Slots:
    """A server with ``n`` slots; one at a time."""

    def __init__(self, given: dict) -> None:
        self._given = given
        self._server: Server | None = None
        self._n = 0
        self._callers = ThreadPoolExecutor(32)

    def prepare(self, n: int) -> None:
        """Have a server with ``n`` slots."""
        if n == self._n:
            return
        self._server = None  # the old one ends before the new one begins
        params = CommonParams()
        params.model.path = self._given["gguf"]
        params.n_parallel = self._n = n
        params.n_ctx = self._given["context"] * n
        params.n_batch = params.n_ubatch = BATCH
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._given["threads"]
        params.cpuparams.poll = params.cpuparams_batch.poll = self._given["poll"]
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.verbosity = 0
        self._server = Server(params)

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> int:
        return sum(self._callers.map(lambda prompt: self._complete(prompt, max_tokens), prompts))

    def _complete(self, prompt: Prompt, max_tokens: int) -> int:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(body)
        if "usage" not in answer:
            print(answer, file=sys.stderr)
            raise SystemExit("the server refused a request")
        return answer["usage"]["completion_tokens"]


def main() -> None:
    write, slots = reserve_output(), Slots(settings())
    serve(write, ("xllamacpp",), slots.generate, slots.prepare)


if __name__ == "__main__":
    main()
