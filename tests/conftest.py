"""A real PostgreSQL for the tests that need one, and for all a search of their outputs.

A server per test process, a database per test.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache

import matrix
import pytest
import scratch
from hypothesis import HealthCheck, settings
from mongodb_servers import MISSING, PROGRAM, URL, MongoServer
from redis_clusters import RedisCluster
from redis_clusters import redis_cluster as run_redis_cluster
from redis_servers import PACKAGES, RedisServer, programs
from redis_servers import redis_server as run_redis_server
from replicas import execute
from secrecy import CANARY, searched_logs, take_leaks

from mnemosyned.embedded.server import EmbeddedPostgres

PASSWORD = f"{CANARY}-the-password-for-these-tests"
_numbers = itertools.count()

# What is slow is told by the time-out of a test, not by its single examples.
settings.register_profile("tests", deadline=None)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


def pytest_configure() -> None:
    scratch.choose(os.environ)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    # No test that was collected is garbage before the end: the collector need not look at thousands of them,
    # now or in any later round.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Before pytest chooses by marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    matrix.mark(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    with searched_logs():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    result = yield
    _fail_for_leaks()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    result = yield
    _fail_for_leaks()
    return result


def _fail_for_leaks() -> None:
    leaks = take_leaks()
    if leaks:
        pytest.fail("\n".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres.start(tmp_path_factory.mktemp("postgres")) as server:
        execute(server.dsn, f"CREATE ROLE tests SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        yield server


@pytest.fixture
def postgres_dsn(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A database for this test."""
    with _database(postgres_server) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def shared_dsn(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A database for this process: what a test makes there, it removes."""
    with _database(postgres_server) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis, or else a Valkey, for this process; each test has a prefix of its own there."""
    kind = next(iter(programs()), "redis")
    yield from _server_of(kind, tmp_path_factory)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Valkey for this process."""
    yield from _server_of("valkey", tmp_path_factory)


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A cluster for this process, which no test may break."""
    if not programs():
        pytest.skip(f"needs {PACKAGES['redis']}, or {PACKAGES['valkey']}")
    with run_redis_cluster(tmp_path_factory.mktemp("redis_cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mongodb_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server for this process, or of MONGODB_URL; each test has a collection of its own."""
    if URL:
        yield URL
        return
    if not PROGRAM.exists():
        pytest.skip(MISSING)
    with MongoServer(tmp_path_factory.mktemp("mongodb") / "server") as server:
        yield server.url


def _server_of(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if kind not in programs():
        pytest.skip(f"needs {PACKAGES[kind]}")
    with run_redis_server(tmp_path_factory.mktemp(kind), kind) as server:
        yield server


@contextmanager
def _database(server: EmbeddedPostgres) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    execute(server.dsn, f"CREATE DATABASE {name} {_copied_by(server.dsn)}")
    yield f"postgres://tests:{PASSWORD}@127.0.0.1:{server.port}/{name}"
    execute(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


@cache
def _copied_by(dsn: str) -> str:
    # Copied files cost less than half of pages that are copied through the log. That is the default since
    # PostgreSQL 15, and before there was no choice.
    ((has_choice,),) = execute(dsn, "SELECT current_setting('server_version_num')::int >= 150000")
    return "STRATEGY file_copy" if has_choice else ""
