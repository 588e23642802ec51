"""The address of the storage as users give it: what is wrong in it, and a file of it that changes."""

from __future__ import annotations

import asyncio
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from poolers import needs_pgbouncer, pooled
from processes import Daemon
from secrecy import CANARY
from waiting import until

from mnemosyned.embedded.server import EmbeddedPostgres

NEW = StartRequest(session=Session(subject_id="s"))
FIRST, SECOND = f"{CANARY}-first", f"{CANARY}-second"


def execute(dsn: str, sql: str) -> list[asyncpg.Record]:
    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


def end_connections(admin: str, user: str) -> None:
    execute(admin, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{user}'")  # noqa: S608


class Secret:
    """A file as Kubernetes mounts it: a link to a directory by a link, which is replaced as one."""

    def __init__(self, directory: Path, text: str) -> None:
        self._directory = directory
        self._count = 0
        (directory / "address").symlink_to("..data/address")
        self.path = directory / "address"
        self.write(text)

    def write(self, text: str) -> None:
        self._count += 1
        new = self._directory / f"..{self._count}"
        new.mkdir()
        (new / "address").write_text(text + "\n")
        (new / "address").chmod(0o600)
        link = self._directory / "..data_tmp"
        link.symlink_to(new.name)
        link.rename(self._directory / "..data")


class Load:
    """One caller who starts a session and reads it, again and again; `failures`: what went wrong."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.failures: list[str] = []
        self.tokens: list[str] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub = SessionManagerStub(channel)
            while not self.is_over.is_set():
                try:
                    token = stub.Start(NEW, timeout=10).session.access_token
                    stub.Get(GetRequest(access_token=token), timeout=10)
                    self.tokens.append(token)
                except grpc.RpcError as exc:
                    self.failures.append(str(exc))


@contextmanager
def loaded(address: str, callers: int = 8) -> Iterator[list[Load]]:
    loads = [Load(address) for _ in range(callers)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    try:
        yield loads
    finally:
        for load in loads:
            load.is_over.set()
        for thread in threads:
            thread.join(20)


@pytest.fixture
def role(postgres_dsn: str) -> Iterator[tuple[str, str]]:
    """A user with the first password; its name and the database's address without it."""
    name = f"rotated_{urlsplit(postgres_dsn).path.strip('/')}"
    execute(postgres_dsn, f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{FIRST}'")
    yield name, postgres_dsn
    execute(postgres_dsn, "DROP SCHEMA IF EXISTS mnemosyne CASCADE")
    execute(postgres_dsn, f"REASSIGN OWNED BY {name} TO tests")
    execute(postgres_dsn, f"DROP OWNED BY {name}")
    end_connections(postgres_dsn, name)
    execute(postgres_dsn, f"DROP ROLE {name}")


def with_password(dsn: str, user: str, password: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}").geturl()


def test_a_password_is_rotated_in_the_file_without_a_failed_call(
    role: tuple[str, str], tmp_path: Path
) -> None:
    name, admin = role
    secret = Secret(tmp_path, with_password(admin, name, FIRST))
    pids = f"SELECT pid FROM pg_stat_activity WHERE usename = '{name}'"  # noqa: S608
    with Daemon(f"-postgres.address.file={secret.path}", "-cache.ttl=0s") as daemon:
        daemon.serving()
        with loaded(daemon.address) as loads:
            until(lambda: all(len(load.tokens) > 20 for load in loads))
            before = {row["pid"] for row in execute(admin, pids)}

            # The file is ahead of the database: the former password goes on.
            secret.write(with_password(admin, name, SECOND))
            refused = daemon.wait_for("postgres_address_reload_failed")
            execute(admin, f"ALTER ROLE {name} PASSWORD '{SECOND}'")
            daemon.wait_for("postgres_address_changed")
            daemon.wait_for("postgres_address_reloaded")
            until(lambda: not before & {row["pid"] for row in execute(admin, pids)})
            done = len(loads[0].tokens)
            until(lambda: len(loads[0].tokens) > done + 20)

            # No address: a line, and the former goes on.
            secret.write("postgres://u:hunter2@h:port/d")
            wrong = daemon.wait_for("postgres_address_reload_failed")
            done = len(loads[0].tokens)
            until(lambda: len(loads[0].tokens) > done + 20)
        assert daemon.stop() == 0

    assert [load.failures for load in loads] == [[] for _ in loads]
    assert "28P01 invalid_password" in refused["error"]
    assert "its port is not a number from 1 to 65535" in wrong["error"]
    assert str(secret.path) in wrong["error"]


def test_after_a_password_that_changed_in_the_database_first_the_file_is_taken(
    role: tuple[str, str], tmp_path: Path
) -> None:
    name, admin = role
    secret = Secret(tmp_path, with_password(admin, name, FIRST))
    with Daemon(f"-postgres.address.file={secret.path}", "-cache.ttl=0s") as daemon:
        daemon.serving()
        execute(admin, f"ALTER ROLE {name} PASSWORD '{SECOND}'")
        end_connections(admin, name)
        lost = daemon.wait_for("storage_lost")
        assert daemon.http("/healthr")[0] == 503
        secret.write(with_password(admin, name, SECOND))
        daemon.wait_for("storage_regained")
        with daemon.stub() as stub:
            assert stub.Start(NEW).session.access_token
        assert daemon.stop() == 0

    assert lost["error"].startswith(("acquire: 28P01 invalid_password", "now: "))
    assert f"user {name}" in lost["error"]


def test_sighup_takes_the_address_and_says_what_is_wrong_with_another(
    postgres_dsn: str, tmp_path: Path
) -> None:
    secret = Secret(tmp_path, postgres_dsn)
    with Daemon(f"-postgres.address.file={secret.path}") as daemon:
        daemon.serving()
        secret.write(f"{postgres_dsn}?application_name=other")
        daemon.process.send_signal(signal.SIGHUP)
        taken = daemon.wait_for("reloaded")
        secret.write(f"{postgres_dsn}?nonsense=1")
        daemon.process.send_signal(signal.SIGHUP)
        refused = daemon.wait_for("reload_refused")
        with daemon.stub() as stub:
            assert stub.Start(NEW).session.access_token
        assert daemon.stop() == 0

    assert "postgres_address" in taken["taken"]
    assert "its parameter nonsense is not known" in refused["error"]


def test_a_database_that_moves_is_followed(postgres_dsn: str, tmp_path: Path) -> None:
    with EmbeddedPostgres.start(tmp_path / "other") as other:
        secret = Secret(tmp_path, postgres_dsn)
        with Daemon(f"-postgres.address.file={secret.path}", "-cache.ttl=0s") as daemon:
            daemon.serving()
            # The new server has no table yet.
            secret.write(other.dsn)
            moved = daemon.wait_for("postgres_address_changed")
            with daemon.stub() as stub:
                token = stub.Start(NEW).session.access_token
            assert daemon.stop() == 0
        found = execute(other.dsn, "SELECT access_token FROM mnemosyne.session")

    assert moved["server"] == f"127.0.0.1:{other.port}"
    assert [row["access_token"].decode() for row in found] == [token]


AUTHENTICATED = b"R\0\0\0\x08\0\0\0\0"
READY = b"Z\0\0\0\x05I"


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"S\0\0\0\x1cserver_version\0nonsense\0",
        b"S\0\0\0\x15server_version\0\xff\0",
        b"D\0\0\0\x06\0\x05",
    ],
    ids=["no version", "a version that is none", "a text that is not UTF-8", "a row"],
)
def test_a_program_that_is_no_postgresql_is_named_and_awaited(told: bytes) -> None:
    class Program(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            size = int.from_bytes(self.rfile.read(4), "big")
            self.rfile.read(size - 4)
            self.wfile.write(AUTHENTICATED + told + READY)
            self.rfile.read()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Program) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"postgres://u:{FIRST}@127.0.0.1:{server.server_address[1]}/d?sslmode=disable"
        with Daemon(f"-postgres.address={address}") as daemon:
            waiting = daemon.wait_for("storage_not_ready")
            assert daemon.stop() == 0
        server.shutdown()

    assert waiting["error"].startswith("connect: not postgresql (server 127.0.0.1:")
    assert waiting["hint"] == "another program answers there: see host and port in the address"


def test_a_daemon_that_waits_for_a_wrong_host_takes_the_right_one_from_its_file(
    postgres_dsn: str, tmp_path: Path
) -> None:
    secret = Secret(tmp_path, "postgres://u:p@127.0.0.1:9/d")
    with Daemon(f"-postgres.address.file={secret.path}") as daemon:
        waiting = daemon.wait_for("storage_not_ready")
        secret.write(postgres_dsn)
        daemon.wait_for("storage_ready")
        assert daemon.stop() == 0

    assert waiting["error"] == "connect: connection refused (server 127.0.0.1:9, database d, user u)"
    assert waiting["hint"].startswith("no server listens there")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("postgres://u:hunter2@127.0.0.1:9/d?nonsense=1", "its parameter nonsense is not known"),
        (
            "postgres://u:hunter2@127.0.0.1:9/d?channel_binding=require",
            "its parameter channel_binding cannot be",
        ),
        (
            "postgres://u:hunter2@127.0.0.1:9/d?sslcert=/nowhere/crt&sslkey=/x",
            "its sslcert, /nowhere/crt: No such",
        ),
        ("postgres://u:hunter2@127.0.0.1:0/d", "its port is not a number"),
        ("", "it is empty"),
    ],
)
@pytest.mark.parametrize("check", [True, False], ids=["check", "start"])
def test_a_wrong_address_ends_the_start_with_one_line(address: str, words: str, check: bool) -> None:  # noqa: FBT001
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mnemosyned",
            "-port=0",
            f"-postgres.address={address}",
            f"-check-config={check}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("mnemosyned: flag -postgres.address: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


def test_a_dropped_parameter_is_a_line_at_the_start_and_a_warning_of_check_config(postgres_dsn: str) -> None:
    flag = f"-postgres.address={postgres_dsn}?pgbouncer=true"
    done = subprocess.run(
        [sys.executable, "-m", "mnemosyned", flag, "-check-config"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    with Daemon(flag) as daemon:
        line = daemon.wait_for("postgres_parameter_ignored")
        daemon.wait_for("storage_ready")
        daemon.stop()

    assert done.returncode == 0
    assert "warning: flag -postgres.address: its parameter pgbouncer is ignored: " in done.stderr
    assert line["parameter"] == "pgbouncer"


@needs_pgbouncer
@pytest.mark.parametrize(
    ("settings", "user", "words"),
    [
        ({"pool_mode": "transaction"}, "", "the pooler in front of PostgreSQL is in transaction mode"),
        ({"pool_mode": "session"}, "stranger", "08P01"),
        ({"pool_mode": "session", "auth_type": "trust"}, "stranger", ""),
    ],
    ids=str,
)
def test_a_pooler_that_cannot_work_ends_the_start_with_one_line(
    postgres_dsn: str, tmp_path: Path, settings: dict[str, str], user: str, words: str
) -> None:
    with pooled(postgres_dsn, tmp_path, **settings) as pooler:
        dsn = with_password(pooler.dsn, user, "hunter2") if user else pooler.dsn
        with Daemon(f"-postgres.address={dsn}") as daemon:
            assert daemon.end() == 1

    last = daemon.lines[-1]
    assert words in last
    assert "hunter2" not in last
