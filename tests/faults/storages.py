"""The storages of the laboratory: servers that are ended, frozen, and replaced by a copy. It all blocks."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from mongodb_servers import MongoServer
from redis_clusters import redis_cluster
from redis_servers import RedisServer, programs
from replicas import execute, kill, promote, standby_of, until_true
from waiting import until

from mnemosyned.embedded.probes import servers_on
from mnemosyned.embedded.server import EmbeddedPostgres


class Storage(Protocol):
    """A server, of which there may be a copy that is as recent as what was acknowledged."""

    flags: tuple[str, ...]  # of the daemons, besides the address
    is_direct: bool  # nodes reach it at `dsn`; otherwise each has a relay to `port`
    has_copy: bool  # otherwise it is never asked to make or to promote one

    @property
    def dsn(self) -> str:
        """Its address on loopback."""
        ...

    @property
    def port(self) -> int:
        """Its port, another one after `promote_copy`."""
        ...

    def end(self, *, is_killed: bool) -> None:
        """End it, or have it end."""
        ...

    def has_ended(self) -> bool:
        """Tell whether it has."""
        ...

    def restart(self) -> None:
        """Start it again, with what it has stored."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        ...

    def make_copy(self) -> None:
        """Have a copy that has all that is acknowledged from now on."""
        ...

    def promote_copy(self) -> None:
        """Put the copy in its place, after it was killed."""
        ...

    def stop(self) -> None:
        """End all there is."""
        ...


class PostgresStorage:
    """PostgreSQL; a copy is made when it is needed, and synchronous from then on."""

    flags: tuple[str, ...] = ()
    is_direct = False
    has_copy = True

    def __init__(self, directory: Path, _host: str) -> None:
        self._directory = directory
        self._server = EmbeddedPostgres.start(directory / "storage")
        self._copy: EmbeddedPostgres | None = None
        self._copies = 0

    @property
    def dsn(self) -> str:
        return self._server.dsn

    @property
    def port(self) -> int:
        return self._server.port

    def end(self, *, is_killed: bool) -> None:
        if is_killed:
            kill(self._server)
            return
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGINT)

    def has_ended(self) -> bool:
        return self._server.exited()

    def restart(self) -> None:
        self._server.restart()

    def signal(self, number: int) -> None:
        for pid in servers_on(self._server.directory / "data"):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def make_copy(self) -> None:
        self._copies += 1
        primary = self._server
        self._copy = standby_of(primary, self._directory / f"standby-{self._copies}")
        until_true(primary.dsn, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
        # After the copy was made: the copy itself waits for nobody.
        execute(primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        until_true(primary.dsn, "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def promote_copy(self) -> None:
        assert self._copy is not None
        promote(self._copy)
        former, self._server, self._copy = self._server, self._copy, None
        former.stop()

    def stop(self) -> None:
        self._server.stop()


class _ChildStorage:
    """A server that is one process, a child of this one."""

    _server: RedisServer | MongoServer

    @property
    def port(self) -> int:
        return self._server.port

    def end(self, *, is_killed: bool) -> None:
        self._server.signal(signal.SIGKILL if is_killed else signal.SIGTERM)

    def has_ended(self) -> bool:
        return self._server.process is None or self._server.process.poll() is not None

    def restart(self) -> None:
        self._server.start()

    def signal(self, number: int) -> None:
        self._server.signal(number)


class RedisStorage(_ChildStorage):
    """Redis with a replica, which confirms each write."""

    _server: RedisServer
    flags: tuple[str, ...] = ("-redis.wait=1",)
    is_direct = False
    has_copy = True

    def __init__(self, directory: Path, _host: str) -> None:
        self._directory = directory
        self._program = next(iter(programs().values()))
        self._servers = 0
        self._server = self._new({})
        self._replica = self._new({"replicaof": f"127.0.0.1 {self._server.port}"})
        self._until_replicated()

    def _new(self, settings: dict[str, str]) -> RedisServer:
        self._servers += 1
        return RedisServer(self._directory / f"redis-{self._servers}", self._program, settings).start()

    def _until_replicated(self) -> None:
        until(lambda: b"state=online" in self._server.command("INFO", "replication"))

    @property
    def dsn(self) -> str:
        return self._server.url

    def make_copy(self) -> None:
        self._until_replicated()

    def promote_copy(self) -> None:
        former, self._server = self._server, self._replica
        former.kill()
        self._server.command("REPLICAOF", "NO", "ONE")
        # Also when it is started again.
        del self._server.settings["replicaof"]
        self._replica = self._new({"replicaof": f"127.0.0.1 {self._server.port}"})

    def stop(self) -> None:
        self._server.kill()
        self._replica.kill()


class RedisClusterStorage:
    """A Redis Cluster; a copy takes the place of one primary, and each time of another one."""

    flags: tuple[str, ...] = ()
    is_direct = True
    has_copy = True

    def __init__(self, directory: Path, host: str) -> None:
        self._stack = ExitStack()
        settings = {"cluster-require-full-coverage": "no"}
        self._cluster = self._stack.enter_context(redis_cluster(directory / "redis", host=host, **settings))
        self._copies = 0
        self._ending: list[RedisServer] = []

    @property
    def dsn(self) -> str:
        return self._cluster.url

    @property
    def port(self) -> int:
        return self._cluster.nodes[0].port

    def end(self, *, is_killed: bool) -> None:
        self._ending = self._ending or self._cluster.living()
        for node in self._ending:
            node.signal(signal.SIGKILL if is_killed else signal.SIGTERM)

    def has_ended(self) -> bool:
        return not any(node in self._cluster.living() for node in self._ending)

    def restart(self) -> None:
        for node in self._ending:
            node.start()
        self._ending = []
        self._cluster.until_whole()

    def signal(self, number: int) -> None:
        for node in self._cluster.living():
            node.signal(number)

    def make_copy(self) -> None:
        self._cluster.until_whole()
        primaries = sorted(self._cluster.primaries(), key=lambda node: node.port)
        # The home is among them.
        self._ending = [primaries[self._copies % len(primaries)]]
        self._copies += 1

    def promote_copy(self) -> None:
        self._cluster.until_whole(0)
        self.restart()

    def stop(self) -> None:
        self._stack.close()


class MongoStorage(_ChildStorage):
    """SecantusDB, which speaks MongoDB's protocol and has no copies: this says nothing of a failover."""

    flags: tuple[str, ...] = ("-mongodb.timeout=1s",)
    is_direct = False
    has_copy = False

    def __init__(self, directory: Path, _host: str) -> None:
        self._server = MongoServer(directory / "mongodb", ("--sync-on-commit",)).start()

    @property
    def dsn(self) -> str:
        # Otherwise the server would tell the nodes the address that it has on loopback.
        return f"{self._server.url}?directConnection=true"

    def make_copy(self) -> None:
        raise AssertionError("it has none")

    def promote_copy(self) -> None:
        raise AssertionError("it has none")

    def stop(self) -> None:
        self._server.kill()


AnyStorage: TypeAlias = PostgresStorage | RedisStorage | RedisClusterStorage | MongoStorage
STORAGES: Final[dict[str, type[AnyStorage]]] = {
    "postgres": PostgresStorage,
    "redis": RedisStorage,
    "redis-cluster": RedisClusterStorage,
    "mongodb": MongoStorage,
}
