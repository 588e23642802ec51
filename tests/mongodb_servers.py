"""Servers of MongoDB's protocol for the tests.

No MongoDB can be installed from Debian or PyPI. SecantusDB, which speaks its protocol, takes its place: a
process of its own, from an environment of its own that `make` keeps. It is slow, and not what production
runs. With MONGODB_URL, tests/integration/test_mongodb_server.py runs the same suites on a real server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import pymongo
import pytest
from child_servers import ChildServer
from pymongo.errors import PyMongoError

# As in the Makefile.
VERSION: Final = "0.7.0b3"
PROGRAM: Final = Path(__file__).parents[1] / f".cache/secantusdb-{VERSION}/bin/secantusd-py"
MISSING: Final = f"needs {PROGRAM}, which `make test` installs"
# A real server, for those who have one; its database gets collections of random names, which are left.
URL: Final = os.environ.get("MONGODB_URL", "")
_READY_S: Final = 30

needs_real_mongodb: Final = pytest.mark.skipif(not URL, reason="needs MONGODB_URL")
needs_mongodb: Final = pytest.mark.skipif(not PROGRAM.exists(), reason=MISSING)


@dataclass
class MongoServer(ChildServer):
    """A replica set of one member."""

    options: tuple[str, ...] = ()
    tls: str = ""  # the options of an address for TLS

    @property
    def url(self) -> str:
        host, options = ("localhost", f"?{self.tls}") if self.tls else ("127.0.0.1", "")
        return f"mongodb://{host}:{self.port}/test{options}"

    def start(self) -> Self:
        """Start it, with the data that it has, and wait until it answers."""
        self.directory.mkdir(exist_ok=True)
        command = [PROGRAM, "--port", str(self.port), "--storage-path", self.directory / "data"]
        # Its own configuration files are nobody's business.
        self.run([*command, *self.options], os.environ | {"HOME": str(self.directory)})
        deadline_s = time.monotonic() + _READY_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            with suppress(PyMongoError):
                self.command({"ping": 1}, timeout_ms=1000)
                return self
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.02)

    def command(self, document: dict[str, Any], *, timeout_ms: int = 10_000) -> dict[str, Any]:
        """Run one command on the test database, as another program would."""
        with self.connected(timeout_ms) as database:
            return database.command(document)

    @contextmanager
    def connected(self, timeout_ms: int = 10_000) -> Iterator[pymongo.database.Database[dict[str, Any]]]:
        """Lend the test database."""
        client: pymongo.MongoClient[dict[str, Any]]
        with pymongo.MongoClient(self.url, directConnection=True, timeoutMS=timeout_ms) as client:
            yield client["test"]

    def signal(self, number: int) -> None:
        """Send a signal; after SIGSTOP all its threads stand."""
        super().signal(number)
        assert self.process is not None
        stat = Path(f"/proc/{self.process.pid}/stat")
        while number == signal.SIGSTOP and stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)

    def stop(self) -> None:
        """Have it write all it has, and end."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(20)
        self.process = None
