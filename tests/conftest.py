"""Fixtures that several test files share."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest

from databases import database_address, postgresql_address
from fakes import Bench, in_process, serving
from served import served

__all__ = ["database_address", "postgresql_address", "served"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "postgresql: needs a server (TEST_POSTGRESQL); .ci/run starts one"
    )


@pytest.fixture
def bench() -> Bench:
    """Fakes to script before (or while) ``client`` asks."""
    return Bench()


@pytest.fixture
async def client(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the gateway over ``bench`` in this process, with a customer's key."""
    async with in_process(bench) as client:
        yield client


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
