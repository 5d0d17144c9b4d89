"""The gateway serves 10 times LiteLLM's requests/s in half its memory, adds 5 ms beside the disk.

    .venv/bin/python benchmarks/gateway_overhead.py [--rounds 3] [--seconds 8] [--folder DIR]

Both stand before the same mock of a model server (this script's own, a process of its own) on
the same cores, in one run, taking turns. Load on one is: 16 connections of `wrk`, each asking
for a whole chat completion as soon as it has the last one. Ours runs its real path: key check,
audit entry on disk before each answer. LiteLLM has neither guard nor such a record, so the
row to compare is ours with the guard off; the text guard's row is beside it.

Latency is measured in an open loop at 300 requests/s: each request counts from the moment it
was due. What a gateway adds is its percentile less the mock's own. An answer of ours waits for
the disk to keep its entry, up to twice (for the batch before it and its own), so the time that
this disk takes for one fdatasync is printed, and one row has its home in memory: that is what
the program adds. Put --folder on the disk that will hold the database. LiteLLM is installed
into .peers/litellm by the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
import uvloop

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".peers" / "litellm"
CONNECTIONS = 16
RATE = 300
MODEL = "mock"
ASK = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "What is the Golden Gate?"}]}
)
PATH = "/v1/chat/completions"
START_TIMEOUT_S = 120
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
_HEAD = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": MODEL}
_WORDS = ["The", "Golden", "Gate", "is", "a", "strait", "of", "the", "Pacific."]


class Mock(asyncio.Protocol):
    """A model server that knows one answer, whole or streamed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = re.search(rb"content-length: *(\d+)", self._buffer[:end].lower())
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            self._transport.write(STREAMED if re.search(rb'"stream": ?true', body) else WHOLE)


def _response(kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _whole() -> bytes:
    message = {"role": "assistant", "content": " ".join(_WORDS)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": len(_WORDS), "total_tokens": 18}
    answer = {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}
    return _response("application/json", json.dumps(answer).encode())


def _streamed() -> bytes:
    deltas = [{"role": "assistant", "content": ""}, *({"content": f"{w} "} for w in _WORDS), {}]
    events = [
        {"choices": [{"index": 0, "delta": d, "finish_reason": None if d else "stop"}]}
        for d in deltas
    ]
    usage = {"prompt_tokens": 9, "completion_tokens": len(_WORDS), "total_tokens": 18}
    events.append({"choices": [], "usage": usage})
    chunks = [json.dumps({**_HEAD, "object": "chat.completion.chunk", **event}) for event in events]
    lines = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
    return _response("text/event-stream", lines.encode())


WHOLE, STREAMED = _whole(), _streamed()


@dataclass
class Server:
    """Something that answers chats. ``process`` is its own and all its children's root."""

    name: str
    port: int
    process: psutil.Process
    key: str = "none"
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies_s: list[list[float]] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        return {"content-type": "application/json", "authorization": f"Bearer {self.key}"}

    def memory_mb(self) -> float:
        """Of the whole tree; pages that its processes share count once."""
        return sum(process.memory_full_info().pss for process in self._tree()) / 1e6

    def cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._tree()]
        return sum(one.user + one.system for one in times)

    def _tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(server: Server, log: Path) -> Server:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            url = f"http://127.0.0.1:{server.port}{PATH}"
            answer = httpx.post(url, headers=server.headers(), content=ASK, timeout=10)
            if answer.status_code == 200 and _WORDS[-1] in answer.text:
                return server
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{server.name} does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_mock(stack: ExitStack, folder: Path) -> Server:
    port = free_port()
    command = [sys.executable, str(Path(__file__).resolve()), "--serve-mock", str(port)]
    process = stack.enter_context(running(command, folder / "mock.log"))
    mock = Server("mock alone", port, psutil.Process(process.pid))
    return wait_for(mock, folder / "mock.log")


def start_ours(stack: ExitStack, folder: Path, mock: Server, name: str, *settings: str) -> Server:
    home = Path(tempfile.mkdtemp(dir=folder))
    log = home / "log"
    options = [
        "engine.kind=upstream",
        f"upstream.urls=http://127.0.0.1:{mock.port}/v1",
        f"upstream.model={MODEL}",
        "server.max_concurrent_per_key=4096",  # an open loop on a busy machine piles up
        *settings,
    ]
    port = free_port()
    command = [sys.executable, "-m", "fortpoint.cli.main", "serve", "--port", str(port)]
    command += [word for option in options for word in ("--set", option)]
    process = stack.enter_context(running(command, log, FORTPOINT_HOME=str(home)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (key := re.search(r"sk-fp-[\w-]+", log.read_text())):
        if time.monotonic() > deadline or process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return wait_for(Server(name, port, psutil.Process(process.pid), key[0]), log)


def start_litellm(stack: ExitStack, folder: Path, mock: Server) -> Server:
    install_litellm()
    key = "sk-" + secrets.token_hex(24)
    parameters = {
        "model": f"openai/{MODEL}",
        "api_base": f"http://127.0.0.1:{mock.port}/v1",
        "api_key": "none",
    }
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
        "general_settings": {"master_key": key},
    }
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(config))  # which is YAML too
    port = free_port()
    command = [str(PEER / "bin" / "litellm"), "--config", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    log = folder / "litellm.log"
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = stack.enter_context(running(command, log, **quiet))
    return wait_for(Server("LiteLLM", port, psutil.Process(process.pid), key), log)


def install_litellm() -> None:
    if not (PEER / "bin" / "litellm").exists():
        print(f"installing LiteLLM into {PEER}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        subprocess.run(
            [str(PEER / "bin" / "python"), "-m", "pip", "install", "-q", "litellm[proxy]"],
            check=True,
        )


def closed_loop(server: Server, seconds: int, folder: Path) -> float:
    """Requests/s of 16 connections. An answer that is not 200 ends the run."""
    headers = "".join(f'wrk.headers["{k}"] = "{v}"\n' for k, v in server.headers().items())
    script = folder / f"{server.port}.lua"
    script.write_text(f"wrk.method = 'POST'\n{headers}wrk.body = '{ASK}'\n")
    said = subprocess.run(
        [
            *("wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s"),
            *("-s", str(script), f"http://127.0.0.1:{server.port}{PATH}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"{server.name} failed under load:\n{said}")
    return float(re.search(r"Requests/sec: +([\d.]+)", said)[1])


class Client(asyncio.Protocol):
    """One kept connection; one request at a time."""

    def __init__(self, idle: list[Client]) -> None:
        self._idle = idle
        self.ended: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""

    def ask(self, request: bytes) -> asyncio.Future[float]:
        self.ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self.ended

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", self._buffer[: max(end, 0)].lower())
        if end < 0 or length is None or len(self._buffer) < end + 4 + int(length[1]):
            return
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            self.ended.set_exception(RuntimeError(self._buffer[:200].decode()))
        else:
            self.ended.set_result(time.perf_counter())
        self._buffer = b""
        self._idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_exception(error or ConnectionResetError())


async def open_loop(server: Server, seconds: int) -> list[float]:
    """Seconds from when each request was due to its last byte."""
    head = [f"POST {PATH} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(ASK)}"]
    head += [f"{name}: {value}" for name, value in server.headers().items()]
    request = ("\r\n".join(head) + "\r\n\r\n" + ASK).encode()
    loop, idle = asyncio.get_running_loop(), []

    async def one(due: float) -> float:
        client = (
            idle.pop()
            if idle
            else (await loop.create_connection(lambda: Client(idle), "127.0.0.1", server.port))[1]
        )
        return await client.ask(request) - due

    started = time.perf_counter() + 0.1  # the loop's own clock counts milliseconds
    tasks = []
    for number in range(RATE * seconds):
        due = started + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    took = await asyncio.gather(*tasks)
    for client in idle:
        client._transport.close()
    return took[RATE:]  # the first second opens connections


def percentile_ms(latencies: list[float], share: float) -> float:
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


def measure(servers: list[Server], rounds: int, seconds: int, folder: Path) -> None:
    """Rounds of all, in turn, so that a slow minute of the machine meets each of them."""
    for number in range(rounds):
        for server in servers[:: 1 if number % 2 == 0 else -1]:
            before = server.cpu_s()
            rate = closed_loop(server, seconds, folder)
            server.rates.append(rate)
            server.cpu_ms.append((server.cpu_s() - before) * 1e3 / (rate * seconds))
            if rate > RATE:
                server.latencies_s.append(uvloop.run(open_loop(server, seconds)))


@dataclass
class Row:
    name: str
    requests_per_s: float
    lowest: float
    highest: float
    cpu_ms: float
    p50_ms: float | None
    p99_ms: float | None
    added_p50_ms: float | None
    added_p99_ms: float | None
    memory_mb: float


def row_of(server: Server, mock: Server) -> Row:
    """Medians over rounds; what is added, of differences within a round."""
    own = {q: [percentile_ms(one, q) for one in server.latencies_s] for q in (0.5, 0.99)}
    base = {q: [percentile_ms(one, q) for one in mock.latencies_s] for q in (0.5, 0.99)}
    added = {q: [a - b for a, b in zip(own[q], base[q], strict=False)] for q in own}
    middle = statistics.median
    return Row(
        server.name,
        middle(server.rates),
        min(server.rates),
        max(server.rates),
        middle(server.cpu_ms),
        middle(own[0.5]) if own[0.5] else None,
        middle(own[0.99]) if own[0.99] else None,
        middle(added[0.5]) if added[0.5] else None,
        middle(added[0.99]) if added[0.99] else None,
        server.memory_mb(),
    )


def fdatasync_ms(folder: Path) -> str:
    """Of three pages, as a batch of entries writes them."""
    took = []
    with (folder / "sync").open("wb") as file:
        for _ in range(300):
            file.write(bytes(3 * 4096))
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return f"p50 {percentile_ms(took, 0.5):.2f}, p99 {percentile_ms(took, 0.99):.2f}"


def conditions(folder: Path) -> dict[str, object]:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    peer = subprocess.run(
        [str(PEER / "bin" / "python"), "-m", "pip", "list", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = {one["name"]: one["version"] for one in json.loads(peer.stdout)}
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "commit": said.stdout.strip(),
        "python": platform.python_version(),
        "litellm": versions.get("litellm"),
        "load_average": round(os.getloadavg()[0], 2),
        "fdatasync_ms": fdatasync_ms(folder),
    }


def report(rows: list[Row], goals: dict[str, object]) -> None:
    titles = f"{'requests/s':>11}{'spread':>16}{'CPU ms':>9}{'p50 ms':>9}{'p99 ms':>9}"
    print(f"{'':<24}{titles}{'memory MB':>11}")
    for row in rows:
        spread = f"{row.lowest:.0f} to {row.highest:.0f}"
        latency = [f"{ms:.2f}" if ms is not None else "-" for ms in (row.p50_ms, row.p99_ms)]
        print(
            f"{row.name:<24}{row.requests_per_s:>11.0f}{spread:>16}{row.cpu_ms:>9.2f}"
            f"{latency[0]:>9}{latency[1]:>9}{row.memory_mb:>11.0f}"
        )
    print("\nCPU: of one request in the closed loop, all processes.")
    print(f"Latency: open loop at {RATE} requests/s; - where fewer are served at all.\n")
    for name, value in goals.items():
        print(f"{name:<60}{value}")


def goals_of(ours: Row, quick: Row, guarded: Row, peer: Row) -> dict[str, object]:
    def shown(ms: float | None) -> str:
        return "-" if ms is None else f"{ms:.2f} ms"

    return {
        "requests/s against LiteLLM (goal >= 10)": (
            f"{ours.requests_per_s / peer.requests_per_s:.1f}x, "
            f"with text guard {guarded.requests_per_s / peer.requests_per_s:.1f}x"
        ),
        f"p99 added at {RATE} requests/s (goal <= 5 ms)": (
            f"{shown(quick.added_p99_ms)} beside the disk, with it {shown(ours.added_p99_ms)}, "
            f"with it and text guard {shown(guarded.added_p99_ms)}"
        ),
        "memory against LiteLLM (goal <= 0.5)": (
            f"{ours.memory_mb / peer.memory_mb:.2f}, "
            f"with text guard {guarded.memory_mb / peer.memory_mb:.2f}"
        ),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


async def serve_mock(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of each load in each round")
    parser.add_argument("--folder", type=Path, help="where the homes are made")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-mock", type=int, metavar="PORT", help="be the mock, nothing else")
    options = parser.parse_args()
    if options.serve_mock:
        try:
            uvloop.run(serve_mock(options.serve_mock))
        except KeyboardInterrupt:
            return
    if shutil.which("wrk") is None:
        raise SystemExit("this needs wrk (on Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory(dir=options.folder) as name, ExitStack() as stack:
        folder = Path(name)
        mock = start_mock(stack, folder)
        ours = start_ours(stack, folder, mock, "ours, guard off", "guard.enabled=false")
        guarded = start_ours(stack, folder, mock, "ours, text guard", "guard.probes=false")
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        quick = start_ours(stack, memory, mock, "ours, home in memory", "guard.enabled=false")
        peer = start_litellm(stack, folder, mock)
        servers = [mock, ours, quick, guarded, peer]
        found = conditions(folder)
        measure(servers, options.rounds, options.seconds, folder)
        rows = [row_of(server, mock) for server in servers]
    goals = goals_of(*rows[1:])
    if options.json:
        print(json.dumps({**found, "rows": [asdict(row) for row in rows], "goals": goals}))
        return
    for key, value in found.items():
        print(f"{key:<14}{value}")
    print()
    report(rows, goals)


if __name__ == "__main__":
    main()
