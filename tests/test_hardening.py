"""Processes that gave their rights away try to take them back, from inside and outside.

Every attempt runs in a real subprocess; nothing is faked. On a kernel without Landlock or on
an architecture without our filter the tests that need them skip and say so.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fortpoint import hardening
from fortpoint.errors import SandboxError
from fortpoint.hardening import kernel

needs_landlock = pytest.mark.skipif(
    hardening.landlock_abi() == 0, reason="this kernel has no Landlock"
)
needs_seccomp = pytest.mark.skipif(
    not hardening.seccomp_available(), reason="no seccomp filter for this platform"
)
linux_only = pytest.mark.skipif(not kernel.LINUX, reason="prctl and capabilities are Linux's")

CONFINE = """
import json, os, socket, sys, threading, ctypes, errno, signal, asyncio
from pathlib import Path
from fortpoint.hardening import *
from fortpoint.hardening import kernel
place = Path(sys.argv[1])
def attempt(action):
    try:
        return str(action())
    except OSError as error:
        return errno.errorcode[error.errno]
"""
ENGINE_STEPS = """
harden_process(os.getppid())
confine_files([*python_paths(), *runtime_paths(), place / "models"])
forbid_syscalls(ENGINE)
"""


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONFINE + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )


def answers(script: str, *arguments: object) -> Any:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    (place / "models").mkdir()
    (place / "models" / "weights").write_text("weights")
    (place / "state").mkdir()
    (place / "fortpoint.db").write_text("keys")
    return place


@pytest.fixture(scope="module")
def engine(place: Path) -> dict[str, Any]:
    """What an engine-like process got for each thing it tried."""
    found: dict[str, Any] = answers(
        """
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(place / "engine.sock"))
"""
        + ENGINE_STEPS
        + """
libc = kernel.libc()
def raw(number, *arguments):
    result = kernel.syscall(number, *arguments)
    return "ok" if result >= 0 else errno.errorcode[-result]
def pair(kind):
    [end.close() for end in socket.socketpair(socket.AF_UNIX, kind)]
async def echo_once():
    async def answer(reader, writer):
        writer.write(await reader.readexactly(2))
        await writer.drain()
        writer.close()
    async with await asyncio.start_unix_server(answer, sock=listener) as server:
        return len(server.sockets)
started = threading.Event()
worker = threading.Thread(target=started.set); worker.start(); worker.join()
print(json.dumps({
    "read model": attempt((place / "models/weights").read_text),
    "list model folder": attempt(lambda: os.listdir(place / "models")),
    "write model": attempt(lambda: (place / "models/weights").write_text("x")),
    "make file": attempt(lambda: (place / "models/new").write_text("x")),
    "remove model": attempt(lambda: os.unlink(place / "models/weights")),
    "read database": attempt((place / "fortpoint.db").read_text),
    "read passwd": attempt(lambda: open("/etc/passwd").read()),
    "list home": attempt(lambda: os.listdir(place)),
    "write tmp": attempt(lambda: open("/tmp/fortpoint-test", "w")),
    "read parent memory": attempt(lambda: open(f"/proc/{os.getppid()}/mem", "rb").read(1)),
    "read parent environment": attempt(lambda: open(f"/proc/{os.getppid()}/environ").read()),
    "internet socket": attempt(lambda: socket.socket(socket.AF_INET)),
    "datagram socket": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
    "unix socket": attempt(lambda: socket.socket(socket.AF_UNIX)),
    "netlink socket": attempt(lambda: socket.socket(16)),
    "connect listener": attempt(lambda: listener.connect(str(place / "engine.sock"))),
    "stream pair": attempt(lambda: pair(socket.SOCK_STREAM)),
    "datagram pair": attempt(lambda: pair(socket.SOCK_DGRAM)),
    "fork": attempt(os.fork),
    "run program": attempt(lambda: os.execv("/bin/true", ["true"])),
    "open model mode": attempt(lambda: os.chmod(place / "models/weights", 0o777)),
    "signal parent": attempt(lambda: os.kill(os.getppid(), 0)),
    "signal self": attempt(lambda: os.kill(os.getpid(), 0)),
    "memory file": attempt(lambda: os.memfd_create("x")),
    "become dumpable": attempt(lambda: raw(157 if kernel.machine() == "x86_64" else 167, 4, 1)),
    "newest system call": attempt(lambda: raw(463)),
    "raise core limit": attempt(lambda: __import__("resource").prlimit(os.getppid(), 4, (0, 0))),
    "thread": str(started.is_set()),
    "serve": str(asyncio.run(echo_once())),
    "protections": protections(),
}))
""",
        place,
    )
    return found


@needs_landlock
@needs_seccomp
class TestEngineProfile:
    @pytest.mark.parametrize(
        ("action", "answer"),
        [
            ("read model", "weights"),
            ("list model folder", "['weights']"),
            ("stream pair", "None"),
            ("signal self", "None"),
            ("thread", "True"),
            ("serve", "1"),
        ],
    )
    def test_engine_what_it_needs_still_works(
        self, engine: dict[str, Any], action: str, answer: str
    ) -> None:
        assert engine[action] == answer

    @pytest.mark.parametrize(
        "action",
        [
            *("write model", "make file", "remove model"),
            *("read database", "read passwd", "list home", "write tmp"),
            *("read parent memory", "read parent environment"),
        ],
    )
    def test_engine_file_outside_its_rules_is_refused(
        self, engine: dict[str, Any], action: str
    ) -> None:
        assert engine[action] == "EACCES"

    @pytest.mark.parametrize(
        "action",
        [
            *("internet socket", "datagram socket", "unix socket", "netlink socket"),
            *("connect listener", "datagram pair", "fork", "run program", "open model mode"),
            *("signal parent", "memory file", "become dumpable", "raise core limit"),
        ],
    )
    def test_engine_system_call_without_use_is_refused(
        self, engine: dict[str, Any], action: str
    ) -> None:
        assert engine[action] == "EPERM"

    def test_engine_system_call_newer_than_the_list_does_not_exist(
        self, engine: dict[str, Any]
    ) -> None:
        assert engine["newest system call"] == "ENOSYS"

    def test_engine_measures_every_protection_as_on(self, engine: dict[str, Any]) -> None:
        assert all(engine["protections"].values()), engine["protections"]
        assert set(hardening.REQUIRED) <= set(engine["protections"])


@needs_seccomp
@pytest.mark.parametrize(
    "call",
    [
        "kernel.libc().ptrace(16, os.getppid(), None, None)",  # PTRACE_ATTACH
        "kernel.libc().process_vm_readv(os.getppid(), None, 0, None, 0, 0)",
        "kernel.libc().mount(b'/', b'/', None, 4096, None)",
        "kernel.libc().setns(0, 0)",
    ],
)
def test_engine_call_no_honest_code_makes_ends_it(place: Path, call: str) -> None:
    assert run(ENGINE_STEPS + call, place).returncode == -signal.SIGSYS


@needs_seccomp
@pytest.mark.skipif(kernel.machine() != "x86_64", reason="x32 is a table of x86_64")
def test_engine_x32_number_ends_it(place: Path) -> None:
    done = run(ENGINE_STEPS + "kernel.syscall(0x40000000 | 41, 2, 1, 0)", place)
    assert done.returncode == -signal.SIGSYS


@needs_landlock
@needs_seccomp
def test_engine_order_of_start_serves_and_computes(place: Path) -> None:
    """The worker's real order, with torch imported after every door is closed."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"w": torch.eye(64)}, place / "models" / "model.safetensors")
    server = subprocess.Popen(
        [sys.executable, "-c", CONFINE + _SERVE_WITH_TORCH, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready == "ready\n", server.communicate(timeout=10)[1]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(place / "torch.sock"))
            client.sendall(b"go")
            assert client.recv(100) == b"2 threads, 64.0"
    finally:
        server.kill()
        server.communicate(timeout=10)


_SERVE_WITH_TORCH = """
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(place / "torch.sock"))
harden_process(os.getppid())
confine_files([*python_paths(), *runtime_paths(), place / "models"])
forbid_syscalls(ENGINE)
require_protections()
import torch
from safetensors.torch import load_file
torch.set_num_threads(2)
weights = load_file(place / "models" / "model.safetensors")["w"]
async def answer(reader, writer):
    await reader.readexactly(2)
    big = torch.randn(500, 576) @ torch.randn(576, 1536)
    half = big.bfloat16() @ big.bfloat16().T
    total = await asyncio.to_thread(lambda: (weights @ weights).sum().item())
    writer.write(f"{torch.get_num_threads()} threads, {total}".encode())
    await writer.drain()
async def main():
    async with await asyncio.start_unix_server(answer, sock=listener) as server:
        print("ready", flush=True)
        await server.serve_forever()
asyncio.run(main())
"""


@needs_landlock
def test_landlock_alone_stops_tcp_on_kernels_that_can(place: Path) -> None:
    if hardening.landlock_abi() < 4:
        pytest.skip("Landlock controls TCP from ABI 4 on")
    with socket.create_server(("127.0.0.1", 0)) as outside:
        found = answers(
            f"""
            confine_files(python_paths())
            connect = lambda: socket.create_connection(("127.0.0.1", {outside.getsockname()[1]}))
            bind = lambda: socket.create_server(("127.0.0.1", 0))
            print(json.dumps([attempt(connect), attempt(bind)]))
            """,
            place,
        )
    assert found == ["EACCES", "EACCES"]


@linux_only
class TestHardenedProcess:
    def test_memory_of_a_hardened_process_same_user_without_capabilities_is_refused(
        self, place: Path
    ) -> None:
        """Holds for root too, once it has given its capabilities away; not before."""
        with _sleeping("harden_process(os.getppid())") as hardened, _sleeping("") as open_one:
            found = answers(
                """
                harden_process(os.getppid())
                print(json.dumps([
                    attempt(lambda: open(f"/proc/{pid}/mem", "rb").close()) for pid in sys.argv[2:]
                ]))
                """,
                place,
                hardened.pid,
                open_one.pid,
            )
        refused, control = found
        assert refused in ("EACCES", "EPERM")
        # The control: a process of the same user that is not hardened. When the tests run as
        # root it holds capabilities, which protects it as well.
        assert control == ("EACCES" if os.getuid() == 0 else "None")

    def test_crash_leaves_no_core(self, place: Path) -> None:
        code = CONFINE + "harden_process(os.getppid()); os.abort()"
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-c", code, str(place)], dict(os.environ)
        )
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGABRT
        assert not os.WCOREDUMP(status)

    def test_capabilities_are_gone_and_permissions_bind_root(self, place: Path) -> None:
        locked = place / "locked"
        locked.write_text("x")
        locked.chmod(0)
        found = answers(
            """
            harden_process(os.getppid())
            status = dict(l.split(":\\t") for l in open("/proc/self/status") if ":\\t" in l)
            print(json.dumps([
                attempt((place / "locked").read_text), protections()["no_capabilities"],
                [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")],
            ]))
            """,
            place,
        )
        assert found == ["EACCES", True, [0, 0, 0, 0]]

    def test_dies_with_its_parent(self, place: Path) -> None:
        child = "harden_process(os.getppid()); print(os.getpid(), flush=True); signal.pause()"
        parent = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])",
                CONFINE + child,
                str(place),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) > 0
        parent.kill()
        parent.wait(timeout=10)
        # The child, paused for ever, holds the pipe's other end: the file's end is its death.
        assert parent.stdout.read() == ""
        parent.stdout.close()

    def test_another_parent_than_expected_is_an_error(self, place: Path) -> None:
        done = run("harden_process(1 << 30)", place)
        assert "SandboxError: the process that started this one is gone" in done.stderr

    @pytest.mark.parametrize("step", ["harden_process()", "confine_files([])"])
    def test_with_a_second_thread_refuses(self, place: Path, step: str) -> None:
        if "confine" in step and hardening.landlock_abi() == 0:
            pytest.skip("this kernel has no Landlock")
        done = run(
            f"""
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            {step}
            """,
            place,
        )
        assert "SandboxError" in done.stderr
        assert "binds only the calling thread, and 2 exist already" in done.stderr


@needs_seccomp
def test_filter_binds_threads_that_exist_already(place: Path) -> None:
    found = answers(
        """
        go, results = threading.Event(), []
        def late():
            go.wait()
            results.append(attempt(lambda: socket.socket(socket.AF_INET)))
        thread = threading.Thread(target=late); thread.start()
        forbid_syscalls(ENGINE)
        go.set(); thread.join()
        print(json.dumps(results))
        """,
        place,
    )
    assert found == ["EPERM"]


def test_protections_in_an_open_process_are_off(place: Path) -> None:
    found = answers("print(json.dumps(protections()))", place)
    off = ("landlock", "seccomp", "not_dumpable", "no_core_dumps", "no_network", "no_outbound")
    assert not any(found[name] for name in off)


def test_require_protections_in_an_open_process_names_what_is_missing() -> None:
    with pytest.raises(SandboxError, match=r"landlock, seccomp.*fortpoint doctor"):
        hardening.require_protections(("landlock", "seccomp"))


def test_platform_without_linux_does_what_it_can_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(kernel, "LINUX", False)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append((which, limit)))
    assert hardening.harden_process() is False
    assert limits == [(resource.RLIMIT_CORE, (0, 0))]
    assert hardening.confine_files([]) is False
    assert hardening.forbid_syscalls(hardening.ENGINE) is False
    assert not any(hardening.protections().values())


def test_python_paths_hold_no_current_folder_home_or_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = {path.resolve() for path in hardening.python_paths()}
    assert not paths & {Path("/"), Path.home(), Path.cwd(), tmp_path, Path("/etc"), Path("/tmp")}
    assert Path(os.__file__).resolve().parent in paths


class _sleeping:
    """A process that runs the steps and then waits."""

    def __init__(self, steps: str) -> None:
        self._code = CONFINE + steps + "\nprint('ready', flush=True); signal.pause()"

    def __enter__(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._code, "."], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)
