"""Which tests only `make test-all` runs, because of what they run on.

Many tests run on each storage engine, each gRPC engine and each kind of token. The suite of the contract runs
every storage engine and every gRPC engine in `make test` too. The combinations below use code that the rest
of `make test` runs in another combination, so they are for the time before a merge: they have the mark
`matrix`. A single test that takes long is marked `slow` where it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pytest

# Processes on the second gRPC engine. Above both engines is the same code, and the contract suite runs all of
# it on both.
_SECOND_ENGINE: Final = "grpcio"
_PROCESSES: Final = ("tests/e2e/", "tests/integration/")
# Another server for the same client of ours; and hashed tokens, which are one layer above every engine. What
# that layer asks of an engine is in `test_hashed.py`, on each engine. `make test` has the rest on PostgreSQL.
_FLAVOURS: Final = (
    "valkey",
    "plain postgres",
    "hashed redis",
    "hashed redis cluster",
    "hashed redis h2",
    "hashed redis cluster h2",
    # Pages on the wire, of what `test_store.py` reads from each engine.
    "redis h2",
    "mongodb h2",
)


def mark(items: Iterable[pytest.Item]) -> None:
    """Give the tests of the matrix their mark."""
    for item in items:
        if isinstance(item, pytest.Function) and _is_of_the_matrix(item):
            item.add_marker(pytest.mark.matrix)


def _is_of_the_matrix(item: pytest.Function) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return False
    values = [value for value in callspec.params.values() if isinstance(value, str)]
    if item.nodeid.startswith(_PROCESSES) and _SECOND_ENGINE in values:
        return True
    return any(value in _FLAVOURS for value in values)
