"""The sandboxed process that holds the weights: ``python -m fortpoint.engine.worker SPEC``.

The order is the point:

1. bind the socket, while that is still allowed;
2. give up capabilities, core dumps, tracing; confine files to the interpreter and the model;
3. forbid system calls, and check what is really on if configuration requires it;
4. only then load torch, start the event loop, read the model (its bytes may be hostile),
   and serve.

Nothing that starts a thread (numpy, torch) may be imported before step 2.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from fortpoint import config as configuration
from fortpoint import hardening
from fortpoint.engine.protocol import Description
from fortpoint.errors import FortPointError, ModelError

_MIB = 1024 * 1024


class EngineSpec(msgspec.Struct, frozen=True):
    """What the worker is told by its parent: paths, and which process that is.

    ``probes`` is the stem of the linear probes' two files.
    """

    config: configuration.Engine
    model: str
    socket: str
    probes: str | None
    parent_pid: int


def main() -> int:
    """Run until SIGTERM. Exit code 2 means that a new start would fail in the same way."""
    spec = msgspec.json.decode(sys.argv[1].encode(), type=EngineSpec)
    try:
        listener = bind(Path(spec.socket))
        hardening.harden_process(parent_pid=spec.parent_pid)
        hardening.confine_files(read=readable(spec))
        hardening.forbid_syscalls(hardening.ENGINE)
        if spec.config.sandbox == "require":
            hardening.require_protections(hardening.REQUIRED)
        asyncio.run(_serve(spec, listener))
    except FortPointError as error:
        print(f"engine: {error.message}", file=sys.stderr, flush=True)
        return 2
    return 0


def readable(spec: EngineSpec) -> list[Path]:
    """All that the process may read: interpreter, packages, the model, the probes."""
    probes = [] if spec.probes is None else _probe_files(spec.probes)
    return [*hardening.python_paths(), *hardening.runtime_paths(), Path(spec.model), *probes]


def bind(path: Path) -> socket.socket:
    """The listening socket, for its owner only (mode 0600)."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise ModelError(f"cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(previous)
    listener.listen(128)
    listener.setblocking(False)
    return listener


async def _serve(spec: EngineSpec, listener: socket.socket) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = _Engine(spec)
    server = await asyncio.start_unix_server(engine.server.handle, sock=listener)
    await stop.wait()
    server.close()
    await engine.server.close()
    engine.runner.stop()


class _Engine:
    """Everything that is made once: the model, the runner on it, the server before it."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        from fortpoint.engine import precision
        from fortpoint.engine.chat import ChatTokenizer
        from fortpoint.engine.kv_cache import KVBudget
        from fortpoint.engine.linear_probe import LinearProbes
        from fortpoint.engine.llama import Llama
        from fortpoint.engine.runner import Runner
        from fortpoint.engine.scheduler import Scheduler
        from fortpoint.engine.server import EngineServer
        from fortpoint.vault.model_folder import open_model

        config = spec.config
        torch.set_num_threads(config.threads or os.cpu_count() or 1)
        folder = open_model(Path(spec.model))
        model = Llama.load(
            folder.path, precision.choose(config.dtype, folder.path), config.max_context
        )
        tokenizer = ChatTokenizer.load(folder.path)
        probes = LinearProbes.none(model.config.hidden_size)
        if spec.probes is not None:
            probes = LinearProbes.load(Path(spec.probes), model.config.hidden_size, model.n_layers)
        budget = KVBudget(config.kv_cache_mib * _MIB // model.kv_bytes_per_token)
        model.max_context = min(model.max_context, budget.n_tokens)
        scheduler = Scheduler(config.max_batch, config.prefill_chunk, config.max_queue)
        self.runner = Runner(model, tokenizer, probes, scheduler, budget)
        self.server = EngineServer(self.runner, tokenizer, model.max_context, self._describe)
        self._description = Description(
            id="",
            model=folder.manifest.name,
            digest=folder.manifest.digest,
            architecture=model.architecture,
            dtype=model.precision,
            max_context=model.max_context,
            created=folder.manifest.created,
            pid=os.getpid(),
            running=0,
            waiting=0,
            protections=hardening.protections(),
        )
        self.runner.start()

    def _describe(self, request_id: str) -> Description:
        return msgspec.structs.replace(
            self._description,
            id=request_id,
            running=self.runner.n_running,
            waiting=self.runner.n_waiting,
        )


def _probe_files(stem: str) -> list[Path]:
    return [Path(stem + ".json"), Path(stem + ".safetensors")]


if __name__ == "__main__":
    sys.exit(main())
