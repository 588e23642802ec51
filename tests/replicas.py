"""A PostgreSQL server with a streaming standby, both run by the tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from mnemosyned.embedded.probes import servers_on
from mnemosyned.embedded.server import EmbeddedPostgres


@dataclass
class Replicas:
    """Two servers; which of them is the primary changes."""

    primary: EmbeddedPostgres
    standby: EmbeddedPostgres

    def url(self, *servers: EmbeddedPostgres, query: str = "") -> str:
        """The address of several servers, which have one password."""
        before, _, after = self.primary.dsn.rpartition("@")
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        return f"{before}@{hosts}/{after.partition('/')[2]}{query}"


def execute(dsn: str, *statements: str) -> list[asyncpg.Record]:
    """Run statements one by one; return the rows of the last one."""

    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            rows = [await connection.fetch(statement) for statement in statements]
            return list(rows[-1])
        finally:
            await connection.close()

    # In a thread of its own: the test's event loop may run already.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


def until_true(dsn: str, sql: str) -> None:
    deadline_s = time.monotonic() + 30
    while not execute(dsn, sql)[0][0]:
        assert time.monotonic() < deadline_s, sql
        time.sleep(0.05)


@contextmanager
def replicas(directory: Path) -> Iterator[Replicas]:
    """Run a primary and its standby."""
    with EmbeddedPostgres.start(directory / "one") as primary:
        execute(
            primary.dsn,
            "ALTER SYSTEM SET wal_keep_size = '64MB'",
            # For pg_rewind; it takes a restart.
            "ALTER SYSTEM SET wal_log_hints = on",
        )
        kill(primary)
        primary.restart()
        with standby_of(primary, directory / "two") as standby:
            until_true(primary.dsn, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
            yield Replicas(primary, standby)


def standby_of(primary: EmbeddedPostgres, directory: Path) -> EmbeddedPostgres:
    """Start a copy of a server in a new directory, which follows it."""
    directory.mkdir(mode=0o700)
    assert primary._programs is not None
    owner = primary._run_as.owner
    os.chown(directory, owner, owner)
    log = os.open(directory / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    os.fchown(log, owner, owner)
    backup = primary._run_as.popen(
        [
            str(primary._programs.directory / "pg_basebackup"), "--pgdata", str(directory / "data"),
            "--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--dbname", primary.dsn,
        ],
        log=log,
    )  # fmt: skip
    os.close(log)
    assert backup.wait(60) == 0, (directory / "lock").read_text()
    shutil.copy2(primary.directory / "password", directory / "password")
    (directory / "data" / "postmaster.pid").unlink(missing_ok=True)
    return EmbeddedPostgres.start(directory)


def kill(server: EmbeddedPostgres) -> None:
    """End a server and all its processes at once, as the end of its machine would."""
    _signal(server, signal.SIGKILL)


def stall(server: EmbeddedPostgres) -> None:
    """Stop a server and all its processes as they are: connections stay open, and nothing is answered."""
    _signal(server, signal.SIGSTOP)


def resume(server: EmbeddedPostgres) -> None:
    """Let a stalled server go on."""
    _signal(server, signal.SIGCONT)


def _signal(server: EmbeddedPostgres, number: int) -> None:
    for pid in servers_on(server.directory / "data"):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def promote(server: EmbeddedPostgres) -> None:
    """Make a standby a primary; return once it is."""
    assert execute(server.dsn, "SELECT pg_promote()")[0][0]


def comes_back(server: EmbeddedPostgres) -> None:
    """Start a killed primary again as it was: it knows of no other primary, and waits for no standby."""
    server.restart()
    execute(server.dsn, "ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_reload_conf()")
    until_true(server.dsn, "SELECT current_setting('synchronous_standby_names') = ''")


def rewind(former: EmbeddedPostgres, primary: EmbeddedPostgres) -> None:
    """Make a killed former primary a standby of the new one."""
    assert former._programs is not None
    # pg_rewind looks whether its process is there, and a zombie is.
    assert former.exited()
    # Before version 16, pg_rewind finds the new timeline only after a checkpoint.
    execute(primary.dsn, "CHECKPOINT")
    log = os.open(former.directory / "lock", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    done = former._run_as.popen(
        [
            str(former._programs.directory / "pg_rewind"), "--target-pgdata", str(former.directory / "data"),
            "--source-server", primary.dsn, "--write-recovery-conf", "--no-sync",
        ],
        log=log,
    ).wait(60)  # fmt: skip
    os.close(log)
    assert done == 0, (former.directory / "lock").read_text()
    former.restart()


def set_read_only(server: EmbeddedPostgres, value: str) -> None:
    """Have the server refuse writes, or take them again, also on connections that are open."""
    execute(
        server.dsn,
        "SET default_transaction_read_only = off",
        f"ALTER SYSTEM SET default_transaction_read_only = {value}",
        "SELECT pg_reload_conf()",
    )
