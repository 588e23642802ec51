"""grpcio, the client of Python: blocking and on asyncio."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from interop_calls import call_often, call_often_blocking, check_kinds
from processes import Daemon

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Daemon("-storage=memory") as daemon:
        yield daemon.serving().address


def test_each_kind_of_call_works(address: str) -> None:
    check_kinds(address)


async def test_no_call_fails_while_connections_are_replaced(address: str) -> None:
    await call_often(address)


@pytest.mark.slow
def test_no_blocking_call_fails_while_connections_are_replaced(address: str) -> None:
    # Callers share a connection, so that it is replaced while others have calls under way.
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: call_often_blocking(address, alone=1_500), range(8)))
    call_often_blocking(address)
