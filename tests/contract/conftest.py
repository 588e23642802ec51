"""A database of PostgreSQL that the tests of the contract use one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from replicas import execute
from stores import ODD_TABLE

from mnemosyned.storage.postgres.schema import quoted

# A connection that a failed test has left may hold a lock.
_END_OTHERS: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_EMPTY: Final = f"DROP SCHEMA IF EXISTS {quoted(ODD_TABLE.schema)} CASCADE"


@pytest.fixture
def contract_dsn(shared_dsn: str) -> Iterator[str]:
    """A database for a test that makes no more than ODD_TABLE's schema, with nothing in it.

    It costs about half of a new one, of which files are copied and caches filled by the first connection.
    """
    yield shared_dsn
    execute(shared_dsn, _END_OTHERS, _EMPTY)
