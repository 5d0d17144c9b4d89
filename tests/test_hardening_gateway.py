"""What a confined gateway can still do, and what not: tried in real subprocesses."""

from __future__ import annotations

import socket
from pathlib import Path

from test_hardening import answers, needs_landlock, needs_seccomp, place

__all__ = ["place"]  # the fixture


@needs_landlock
@needs_seccomp
def test_gateway_profile_reaches_engine_and_database_but_not_weights(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as fake_engine:
        fake_engine.bind(str(place / "fake.sock"))
        fake_engine.listen()
        found = answers(_GATEWAY, place)
    assert found == {
        "database": "[(7,)]",
        "engine": "None",
        "weights": "EACCES",
        "weights by another name": "EACCES",
        "internet socket": "EPERM",
        "alg socket": "EPERM",
        "make file private": "None",
        "make file public": "EPERM",
        "run program": "EPERM",
        "served": "pong",
        "no_network": False,
        "others": True,
    }


_GATEWAY = """
import sqlite3
inherited = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(inherited.getsockname())
harden_process(os.getppid())
confine_files([*python_paths(), *runtime_paths()], [place / "state"], tcp=False)
forbid_syscalls(GATEWAY)
def database():
    with sqlite3.connect(place / "state/fortpoint.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (7)")
        connection.commit()
        return connection.execute("SELECT x FROM t").fetchall()
def engine():
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(place / "fake.sock"))
async def serve():
    import uvloop, uvicorn
    length = [(b"content-length", b"4")]
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"pong"})
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", loop="uvloop"))
    task = asyncio.create_task(server.serve(sockets=[inherited]))
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvloop.Loop)
    lines = [b"GET / HTTP/1.1", b"Host: x", b"Connection: close", b"", b""]
    await loop.sock_sendall(client, b"\\r\\n".join(lines))
    received = b""
    while chunk := await loop.sock_recv(client, 1000):
        received += chunk
    server.should_exit = True
    await task
    return received[-4:].decode()
measured = protections()
print(json.dumps({
    "database": attempt(database),
    "engine": attempt(engine),
    "weights": attempt((place / "models/weights").read_text),
    "weights by another name": attempt(
        (place / "state" / ".." / "models" / "weights").read_text),
    "internet socket": attempt(lambda: socket.socket(socket.AF_INET)),
    "alg socket": attempt(lambda: socket.socket(38, socket.SOCK_SEQPACKET)),
    "make file private": attempt(lambda: os.chmod(place / "state/fortpoint.db", 0o600)),
    "make file public": attempt(lambda: os.chmod(place / "state/fortpoint.db", 0o644)),
    "run program": attempt(lambda: os.execv("/bin/true", ["true"])),
    "served": __import__("uvloop").run(serve()),
    "no_network": measured.pop("no_network"),
    "others": all(measured.values()),
}))
"""


@needs_seccomp
def test_gateway_outbound_profile_connects_but_makes_no_odd_socket(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        found = answers(
            f"""
            forbid_syscalls(GATEWAY_OUTBOUND)
            print(json.dumps({{
                "connect": attempt(lambda: socket.create_connection(("127.0.0.1", {port})).close()),
                "vsock": attempt(lambda: socket.socket(40)),
                "netlink": attempt(lambda: socket.socket(16, socket.SOCK_RAW)),
            }}))
            """,
            place,
        )
    assert found == {"connect": "None", "vsock": "EPERM", "netlink": "EPERM"}


@needs_landlock
def test_gateway_before_upstreams_connects_to_their_ports_alone(place: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = [server.getsockname()[1] for server in (upstream, other)]
        found = answers(
            f"""
            import ssl
            from fortpoint.hardening import landlock_abi, outbound_paths
            read = [*python_paths(), *runtime_paths(), *outbound_paths()]
            confine_files(read, connect=[{ports[0]}])
            def connect(port):
                socket.create_connection(("127.0.0.1", port)).close()
            print(json.dumps({{
                "upstream": attempt(lambda: connect({ports[0]})),
                "other": attempt(lambda: connect({ports[1]})),
                "names": attempt(lambda: socket.getaddrinfo("localhost", 80) and None),
                "tls": attempt(lambda: ssl.create_default_context() and None),
                "private keys": attempt(lambda: os.listdir("/etc/ssl/private")),
                "confines tcp": landlock_abi() >= 4,
            }}))
            """,
            place,
        )
    assert found["upstream"] == found["names"] == found["tls"] == "None"
    assert found["private keys"] in {"EACCES", "ENOENT"}
    if found["confines tcp"]:
        assert found["other"] == "EACCES"
