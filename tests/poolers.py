"""A real PgBouncer in front of the tests' PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from clusters import free_ports

needs_pgbouncer = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
# It refuses root, as PostgreSQL does.
_AS_ANOTHER_USER = ("unshare", "--map-user=65534", "--map-group=65534") if os.geteuid() == 0 else ()


class PgBouncer:
    """One process; `dsn` is the given address through it."""

    def __init__(self, dsn: str, directory: Path, **settings: str) -> None:
        (self.port,) = free_ports(1)
        self._file = directory / f"pgbouncer-{self.port}.ini"
        self._users = directory / f"users-{self.port}.txt"
        self._server = urlsplit(dsn)
        self._settings = {"auth_type": "scram-sha-256"} | settings
        self._users.write_text(f'"{self._server.username}" "{self._server.password}"\n')
        self.dsn = self._server._replace(
            netloc=f"{self._server.username}:{self._server.password}@127.0.0.1:{self.port}"
        ).geturl()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        self._write()
        self._process = subprocess.Popen(
            [*_AS_ANOTHER_USER, "pgbouncer", "-q", str(self._file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end_s = time.monotonic() + 10
        while time.monotonic() < end_s:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, "PgBouncer has ended"
            time.sleep(0.02)
        raise AssertionError("PgBouncer does not listen")

    def stop(self) -> None:
        """End the process at once: SIGTERM is its immediate shutdown."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def _write(self) -> None:
        server = self._server
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_file": str(self._users),
            "logfile": "",
            **self._settings,
        }
        lines = [
            "[databases]",
            f"* = host={server.hostname} port={server.port}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        self._file.write_text("\n".join(lines) + "\n")


@contextmanager
def pooled(dsn: str, directory: Path, **settings: str) -> Iterator[PgBouncer]:
    """Run a PgBouncer with these settings."""
    pooler = PgBouncer(dsn, directory, **settings)
    pooler.start()
    try:
        yield pooler
    finally:
        pooler.stop()
