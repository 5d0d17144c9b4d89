"""The sandboxed process that holds the weights: ``python -m fortpoint.engine.worker SPEC``.

The order is the point:

1. bind the socket, while that is still allowed;
2. give up capabilities, core dumps, tracing; confine files to the interpreter and the model;
3. forbid system calls, and check what is really on if configuration requires it;
4. only then load what computes, start the event loop, read the model (its bytes may be hostile),
   and serve.

Nothing that starts a thread (numpy, numba) may be imported before step 2.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fortpoint import config as configuration
from fortpoint import hardening
from fortpoint.engine.protocol import Description, DictionaryCard
from fortpoint.errors import FortPointError, ModelError

if TYPE_CHECKING:
    from fortpoint.engine.chat import ChatTokenizer
    from fortpoint.engine.grammar import GrammarCompiler
    from fortpoint.engine.linear_probe import LinearProbes
    from fortpoint.engine.model import Adapter, Model
    from fortpoint.features.library import Library
    from fortpoint.vault.model_folder import ModelFolder


class EngineSpec(msgspec.Struct, frozen=True):
    """What the worker is told by its parent: paths, and which process that is.

    ``probes`` is the stem of the linear probes' two files, ``features`` the folder of
    dictionaries and directions, ``shipped`` that of the dictionaries that come with the product,
    ``adapters`` that of LoRA adapters; all may be absent. ``targets`` are the features and
    directions that are read at every token.
    """

    config: configuration.Engine
    model: str
    socket: str
    probes: str | None
    parent_pid: int
    features: str | None = None
    adapters: str | None = None
    shipped: str | None = None
    targets: tuple[str, ...] = ()


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
        return asyncio.run(_serve(spec, listener))
    except FortPointError as error:
        print(f"engine: {error.message}", file=sys.stderr, flush=True)
        return 2


def readable(spec: EngineSpec) -> list[Path]:
    """All that the process may read: interpreter, packages, the model and what reads it."""
    probes = [] if spec.probes is None else _probe_files(spec.probes)
    folders = [
        Path(path) for path in (spec.model, spec.features, spec.adapters, spec.shipped) if path
    ]
    return [*hardening.python_paths(), *hardening.runtime_paths(), *folders, *probes]


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


async def _serve(spec: EngineSpec, listener: socket.socket) -> int:
    """Until a signal (0), or until the compute thread has died (1: start again)."""
    stop, crashed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def crash() -> None:
        crashed.set()
        stop.set()

    engine = _Engine(spec, loop, crash)
    server = await asyncio.start_unix_server(engine.server.handle, sock=listener)
    await stop.wait()
    server.close()
    await engine.server.close()
    engine.close()
    return 1 if crashed.is_set() else 0


class _Engine:
    """Everything that is made once: the model, the runner on it, the server before it."""

    def __init__(
        self,
        spec: EngineSpec,
        loop: asyncio.AbstractEventLoop,
        on_crash: Callable[[], object],
    ) -> None:
        from fortpoint.engine.chat import ChatTokenizer
        from fortpoint.engine.intake import Intake
        from fortpoint.engine.loading import load_model
        from fortpoint.engine.runner import Runner
        from fortpoint.engine.scheduler import Scheduler
        from fortpoint.engine.sequence import Sent
        from fortpoint.engine.server import EngineServer
        from fortpoint.engine.taps import Taps
        from fortpoint.engine.target_reader import TargetReader
        from fortpoint.vault.model_folder import open_model

        config, folder = spec.config, open_model(Path(spec.model))
        self._model = model = load_model(folder.path, config)
        library = _library(spec, folder, model)
        adapters = _adapters(spec, folder, model)
        targets = TargetReader.load(spec.targets, library)
        taps = Taps(library, _probes(spec, folder, model), targets)
        tokenizer = ChatTokenizer.load(folder.path)
        grammars = _grammars(folder.path, model, tokenizer)
        scheduler = Scheduler(
            config.max_batch, config.prefill_chunk, config.max_queue, model.max_context
        )

        def deliver(sent: list[Sent]) -> None:  # called from the compute thread
            loop.call_soon_threadsafe(self.server.deliver, sent)

        def crash() -> None:
            loop.call_soon_threadsafe(on_crash)

        self.runner = Runner(model, tokenizer, taps, scheduler, deliver, crash)
        intake = Intake(tokenizer, model.max_context, library, taps, adapters, grammars)
        self.server = EngineServer(self.runner, intake, self._describe)
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
            adapters=tuple(sorted(adapters)),
            dictionaries=tuple(
                DictionaryCard(one.name, one.layer, one.n_features)
                for one in library.dictionaries.values()
            ),
            directions=tuple(sorted(library.directions)),
        )
        self.runner.start()

    def close(self) -> None:
        """After the last step."""
        self.runner.stop()
        self._model.close()

    def _describe(self, request_id: str) -> Description:
        return msgspec.structs.replace(
            self._description,
            id=request_id,
            running=self.runner.n_running,
            waiting=self.runner.n_waiting,
        )


def _probes(spec: EngineSpec, folder: ModelFolder, model: Model) -> LinearProbes:
    from fortpoint.engine.linear_probe import LinearProbes

    if spec.probes is None:
        return LinearProbes.none(model.d_model)
    digest = folder.manifest.digest
    return LinearProbes.load(Path(spec.probes), model.d_model, model.n_layers, digest)


def _library(spec: EngineSpec, folder: ModelFolder, model: Model) -> Library:
    """Dictionaries and directions; what does not fit is said, and left out."""
    from fortpoint.features import shipped
    from fortpoint.features.library import Library

    made_for: tuple[Path, ...] = ()
    if spec.shipped is not None:
        try:
            made_for = shipped.made_for(folder.manifest.digest, Path(spec.shipped))
        except ModelError as error:
            _say_left_out({"what was shipped": error.message})
    own = None if spec.features is None else Path(spec.features)
    library = Library.load(own, model.d_model, model.n_layers, made_for)
    _say_left_out(library.left_out)
    return library


def _adapters(spec: EngineSpec, folder: ModelFolder, model: Model) -> Mapping[str, Adapter]:
    """LoRA adapters by name; what does not fit is said, and left out."""
    from fortpoint.engine.loading import load_adapters

    if spec.adapters is None or not Path(spec.adapters).is_dir():
        return {}
    try:
        adapters = load_adapters(
            Path(spec.adapters), folder.path, model, base_digest=folder.manifest.digest
        )
    except ModelError as error:
        _say_left_out({"adapters": error.message})
        return {}
    _say_left_out(adapters.left_out)
    return adapters


def _say_left_out(left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        print(f"engine: {name} is left out: {reason}", file=sys.stderr, flush=True)


def _grammars(folder: Path, model: Model, tokenizer: ChatTokenizer) -> GrammarCompiler | None:
    """None where the tokenizer is of a kind that grammars cannot follow."""
    from fortpoint.engine.grammar import GrammarCompiler

    try:
        serialized = (folder / "tokenizer.json").read_bytes()
        return GrammarCompiler(serialized, model.vocab_size, tokenizer.eos)
    except ModelError as error:
        print(f"engine: no JSON schemas: {error.message}", file=sys.stderr, flush=True)
        return None


def _probe_files(stem: str) -> list[Path]:
    return [Path(stem + ".json"), Path(stem + ".safetensors")]


if __name__ == "__main__":
    sys.exit(main())
