"""What a well-behaved client notices of heavy calls of others, on both engines: `make stalls`.

One daemon an engine, pinned to one core, on a PostgreSQL of its own. A good client reads a cached session 200
times a second, while another process makes one kind of heavy calls after the other. Printed are the good
client's times, the longest time in which the event loop stood still, how much of it the loop's own thread
worked, and what became of the heavy calls. The work alone does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

import asyncpg
from mnemosynerpc.session_pb2 import GetRequest

# First: tests/ has a folder of this name.
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

from heavy_calls import HEAVY, HeavyCaller
from processes import Daemon
from redteam.good_client import GoodClient
from redteam.lab import SERVICE, SUBJECT, own_session

_ENGINES: Final = ("h2", "grpcio")
# One core. Before what else runs on it, where this user may do that; with all threads that the daemon starts.
_PREFIX: Final = ("taskset", "-c", "0", *(("nice", "-n", "-5") if os.geteuid() == 0 else ()))
_SESSIONS: Final = 20_000  # in the table, for List


async def fill(dsn: str) -> None:
    """Put sessions into the table of a daemon that has made it."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO mnemosyne.session "
        "(access_token, refresh_token, subject_id, subject_client, bag, expire_at) "
        "SELECT convert_to('listed-' || md5(number::text), 'UTF8'), 'shared', 'listed-' || number, 'web', "
        r"'\x22060a016b120176', now() + interval '1 day' + number * interval '1 ms' "
        "FROM generate_series(1, $1) AS number",
        _SESSIONS,
    )
    await connection.execute("ANALYZE mnemosyne.session")
    await connection.close()


@contextmanager
def daemon_on(server: EmbeddedPostgres, engine: str, heartbeat: Path, *flags: str) -> Iterator[Daemon]:
    """Lend a daemon on a database with many sessions."""
    name = f"stalls_{engine}"
    asyncio.run(_create(server.dsn, name))
    dsn = f"{server.dsn.rpartition('/')[0]}/{name}"
    environ = {"PYTHONPATH": str(Path(__file__).parent / "heartbeat"), "HEARTBEAT": str(heartbeat)}
    own = (f"-grpc.engine={engine}", f"-postgres.address={dsn}", "-ttl=2h", "-touch.interval=1m")
    with Daemon(*own, *flags, environ=environ, prefix=_PREFIX) as daemon:
        daemon.serving()
        asyncio.run(fill(dsn))
        yield daemon
        daemon.stop()


async def _create(dsn: str, name: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()


def longest_ms(heartbeat: Path, since_s: float) -> tuple[float, float]:
    """Return the longest standstill that began after an instant, and the longest work in one piece."""
    lines = [tuple(map(float, line.split())) for line in heartbeat.read_text().splitlines()]
    found = [(late_s, work_s) for at_s, late_s, work_s in lines if at_s - late_s >= since_s]
    late_s, work_s = zip(*found, strict=True) if found else ((0.0,), (0.0,))
    return round(max(late_s) * 1000, 1), round(max(work_s) * 1000, 1)


def main() -> None:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only heavy calls whose name has one of these words")
    parser.add_argument("--engine", choices=_ENGINES, action="append", help="both if not said")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each")
    options = parser.parse_args()
    names = [name for name in HEAVY if not options.words or any(word in name for word in options.words)]
    head = ("engine", "heavy calls", "p99 ms", "max ms", "stall ms", "work ms", "outcomes")
    print(_ROW.format(*head), flush=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedPostgres.start(scratch / "postgres"))
        for engine in options.engine or _ENGINES:
            with _Watched(server, engine, scratch / engine) as watched:
                for name in names:
                    print(watched.row(name, options.seconds), flush=True)


_ROW: Final = "{:7} {:38} {:>7} {:>7} {:>8} {:>7}  {}"


class _Watched:
    """A daemon with its good client."""

    def __init__(self, server: EmbeddedPostgres, engine: str, heartbeat: Path) -> None:
        heartbeat.touch()
        self._engine = engine
        self._heartbeat = heartbeat
        self._stack = ExitStack()
        self._daemon = self._stack.enter_context(daemon_on(server, engine, heartbeat))
        message = GetRequest(access_token=own_session(self._daemon)).SerializeToString()
        client = GoodClient(self._daemon.address, f"/{SERVICE}/Get", message, wanted=SUBJECT.encode())
        self._good = self._stack.enter_context(client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]  # as it came

    def row(self, name: str, seconds: float) -> str:
        """Make heavy calls for a while; return a line of the table."""
        with HeavyCaller(name, self._daemon.address, seconds) as caller:
            self._good.report()
            since_s = time.monotonic()
            time.sleep(seconds)
            report, stall = self._good.report(), longest_ms(self._heartbeat, since_s)
            outcomes = ", ".join(f"{count} {status}" for status, count in caller.ended().items())
        if report.failed:
            outcomes += f"; the good client failed: {report.failures}"
        return _ROW.format(self._engine, name, report.p99_ms, report.most_ms, *stall, outcomes)


if __name__ == "__main__":
    main()
