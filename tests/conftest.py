"""Fixtures that several test files share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from fakes import CUSTOMER, Bench
from fortpoint.gateway.app import create_app


@pytest.fixture
def bench() -> Bench:
    """Fakes to script before (or while) ``client`` asks."""
    return Bench()


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the gateway over ``bench`` in this process, with a customer's key."""
    transport = httpx.ASGITransport(app=create_app(bench.services()))
    headers = {"authorization": f"Bearer {CUSTOMER}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway", headers=headers
    ) as client:
        yield client


@contextmanager
def serving(bench: Bench) -> Iterator[str]:
    """A live gateway over ``bench`` on a free local port, in a thread."""
    config = uvicorn.Config(
        create_app(bench.services()),
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the gateway did not start")
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def live(bench: Bench) -> Iterator[str]:
    """The address of a live gateway over ``bench``."""
    with serving(bench) as url:
        yield url


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait (at most five seconds) until something that another thread does is true."""

    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not happen in five seconds")

    return wait
