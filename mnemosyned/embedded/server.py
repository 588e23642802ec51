"""A private PostgreSQL server as our child, for `-postgres.address=embedded:`.

    DIR/data        the cluster            DIR/password    mode 0600
    DIR/port        the last port used     DIR/server.log
    DIR/lock        held by the process that owns the server; others share it

The server gets SIGINT, its fast shutdown, when the thread that started it dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from mnemosyned.embedded.programs import (
    EmbeddedError,
    Programs,
    RunAs,
    find_programs,
    find_run_as,
)

__all__ = ["EmbeddedError", "EmbeddedPostgres", "data_directory"]

_USER: Final = "mnemosyne"
_DATABASE: Final = "postgres"
_READY_TIMEOUT_S: Final = 60.0
_OLD_SERVER_TIMEOUT_S: Final = 5.0  # for each signal
_IMMEDIATE_STOP_TIMEOUT_S: Final = 3.0
_LOOK_AGAIN_S: Final = 0.02
_MAX_LOG_BYTES: Final = 10 * 1024 * 1024
_BIND_TRIES: Final = 3
_PORTS: Final = 2**16
# Why, and after it what PostgreSQL says on its way out.
_QUOTED_LINES: Final = 4
_QUOTED_CHARACTERS: Final = 600
# postmaster.pid, line by line: pid, data directory, start time, port, …, and at last the state.
_PID_FILE_PORT: Final = 3
_PID_FILE_STATE: Final = 7

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_destination": "stderr",
    # Without the DETAIL of a failed statement, which quotes the row, and so an access token.
    "log_error_verbosity": "terse",
}


def data_directory(address: str, environ: Mapping[str, str]) -> Path:
    """Return the directory that an `embedded:` address names.

    `embedded:` alone is `mnemosyned/postgres` under `$XDG_DATA_HOME` or `~/.local/share`;
    `embedded:///abs/dir` and `embedded:rel/dir` are what they say.

    Raises:
        EmbeddedError: there is no home directory.
    """
    path = address.removeprefix("embedded:").removeprefix("//")
    if path:
        return Path(path).absolute()
    base = Path(environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():  # the XDG specification: ignore a relative one
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError:
            raise EmbeddedError("no home directory: set XDG_DATA_HOME or use embedded:///dir") from None
    return base / "mnemosyned" / "postgres"


class EmbeddedPostgres:
    """A running server; `is_owner` tells whether it is our child or somebody else's."""

    @classmethod
    def start(cls, directory: Path, *, binaries: str = "") -> EmbeddedPostgres:
        """Start the server of this directory, or share the one that another process runs.

        Call it from the main thread, before other threads exist.

        Raises:
            EmbeddedError: it cannot be started.
        """
        server = cls(directory.absolute(), binaries)
        try:
            with _translated(directory):
                server._prepare_directory()  # our own
                server._attach_or_own()
        except BaseException:
            server.stop()
            raise
        return server

    def __init__(self, directory: Path, binaries: str) -> None:
        self.directory = directory
        self.port = 0
        self._binaries = binaries
        self._data = directory / "data"
        self._log = directory / "server.log"
        self._password = ""
        self._lock = -1
        self._child: subprocess.Popen[bytes] | None = None
        self._programs: Programs | None = None
        self._run_as = RunAs()

    @property
    def is_owner(self) -> bool:
        """Whether the server is this process's child."""
        return self._lock >= 0

    @property
    def dsn(self) -> str:
        """The address, with the password."""
        return f"postgres://{_USER}:{self._password}@127.0.0.1:{self.port}/{_DATABASE}"

    @property
    def pid(self) -> int | None:
        """The server's process, if it is ours."""
        return None if self._child is None else self._child.pid

    def exited(self) -> bool:
        """Tell whether our server has ended, though nobody stopped it."""
        return self._child is not None and self._child.poll() is not None

    def restart(self) -> None:
        """Start our server again after it ended, on the same port; it recovers by itself.

        Call it from the thread that called `start`, and only as the owner.

        Raises:
            EmbeddedError: it cannot be started; a later try may succeed.
        """
        assert self.is_owner
        with _translated(self.directory):
            self._end_child(0.0)
            self._end_old_server()
            self._start_child()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the server if it is ours: in order, then at once, then by force."""
        self._end_child(timeout_s)
        self._child = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for path in self.directory.iterdir()} - {"lost+found"}
        # All in it may change its owner, so it must not be a directory of something else.
        if names and "lock" not in names and self._major() is None:
            raise EmbeddedError(f"{self.directory} holds other files: name an empty or new directory")
        if self.directory.stat().st_uid == os.geteuid():
            self.directory.chmod(0o700)

    def _attach_or_own(self) -> None:
        def is_settled() -> bool:
            return self._take_lock() or self._attach()

        _wait_until(
            is_settled, _READY_TIMEOUT_S, "another process holds the lock, but its server is not ready"
        )
        if self.is_owner:
            self._end_old_server()
            major = self._major()
            self._programs = find_programs(self._binaries, major)
            self._run_as = find_run_as(self._programs, self.directory)
            if major is None:
                self._initialise()
        self._password = (self.directory / "password").read_text().strip()
        if self.is_owner:
            self._run_server()

    def _major(self) -> int | None:
        path = self._data / "PG_VERSION"
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        match = re.match(r"\d+", text)
        if match is None:
            raise EmbeddedError(f"{path} names no version of PostgreSQL")
        return int(match[0])

    def _take_lock(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self.directory / "lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def _attach(self) -> bool:
        lines = self._pid_file()
        if not _is_ready(lines):
            return False
        # The file of a server that was killed says "ready" too.
        if sys.platform == "linux" and int(lines[0]) not in _servers(self._data):
            return False
        self.port = int(lines[_PID_FILE_PORT])
        return _accepts_connections(self.port)

    def _initialise(self) -> None:
        # Made aside and renamed when whole: a crash half-way must not leave what looks like data.
        # Each try has its own name, since an initdb that was left alone may still clean up after itself.
        for leftover in self.directory.glob("data.new*"):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = self.directory / f"data.new-{secrets.token_hex(4)}"
        password = self._make_password()
        self._run_program(
            "initdb", "-D", str(unfinished), "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password}",
            "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        unfinished.rename(self._data)
        _sync(self.directory)

    def _make_password(self) -> Path:
        unfinished = self.directory / "password.new"
        unfinished.unlink(missing_ok=True)
        with os.fdopen(self._open(unfinished, os.O_EXCL), "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
            file.flush()
            os.fsync(file.fileno())
        password = unfinished.with_name("password")
        unfinished.replace(password)
        # Before the data, so that a power failure cannot leave data without it.
        _sync(self.directory)
        return password

    def _run_program(self, name: str, *arguments: str) -> None:
        assert self._programs is not None
        child, log_start = self._spawn([str(self._programs.directory / name), *arguments])
        try:
            code = child.wait(_READY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EmbeddedError(f"{name} took more than {_READY_TIMEOUT_S:.0f} s") from None
        finally:
            if child.poll() is None:
                # With what it started: initdb runs servers of its own.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if code:
            raise EmbeddedError(f"{name} failed: {self._log_tail(log_start)}")

    def _end_old_server(self) -> None:
        """Wait for what a killed daemon or server left; it has its own order to stop already."""

        def is_gone() -> bool:
            return not _servers(self._data)

        no_signal = 0
        for number in (no_signal, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            for pid in _servers(self._data):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            with suppress(EmbeddedError):
                _wait_until(is_gone, _OLD_SERVER_TIMEOUT_S, "")
                return
        raise EmbeddedError(f"the old server, processes {_servers(self._data)}, does not end")

    def _run_server(self) -> None:
        for is_last in (*[False] * (_BIND_TRIES - 1), True):
            self.port = self._free_port()
            try:
                self._start_child()
            except EmbeddedError:
                # Somebody may have taken the port meanwhile; anything else fails again.
                if is_last or not _is_taken(self.port):
                    raise
            else:
                break
        with os.fdopen(self._open(self.directory / "port", os.O_TRUNC), "w") as file:
            file.write(f"{self.port}\n")

    def _start_child(self) -> None:
        assert self._programs is not None
        command = [str(self._programs.directory / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        settings = [text for name, value in _SETTINGS.items() for text in ("-c", f"{name}={value}")]
        child, log_start = self._spawn([*command, *settings], **self._stale_pid())
        self._child = child

        def is_ready_or_ended() -> bool:
            lines = self._pid_file()
            is_its_own = _is_ready(lines) and int(lines[0]) == child.pid
            return self.exited() or (is_its_own and _accepts_connections(self.port))

        complaint = f"the server is not ready after {_READY_TIMEOUT_S:.0f} s"
        try:
            _wait_until(is_ready_or_ended, _READY_TIMEOUT_S, complaint)
        except EmbeddedError as exc:
            self._end_child(0.0)
            raise EmbeddedError(f"{exc}: {self._log_tail(log_start)}") from None
        if self.exited():
            raise EmbeddedError(f"the server ended at its start: {self._log_tail(log_start)}")

    def _stale_pid(self) -> dict[str, str]:
        """Return what makes PostgreSQL ignore a process that got the number of a dead server.

        It would take that process for the server and refuse to start; pg_ctl names its own parent so.
        Where there is no /proc to see that no server is left, PostgreSQL's caution stays.
        """
        lines = self._pid_file()
        if sys.platform != "linux" or not lines or not lines[0].strip().isdecimal():
            return {}
        return {"PG_GRANDPARENT_PID": lines[0].strip()}

    def _end_child(self, timeout_s: float) -> None:
        if self._child is None:
            return
        waits = (
            (signal.SIGINT, timeout_s),
            (signal.SIGQUIT, _IMMEDIATE_STOP_TIMEOUT_S),
            (signal.SIGKILL, None),
        )
        for number, wait_s in waits:
            self._child.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(wait_s)
                return

    def _free_port(self) -> int:
        with suppress(OSError, ValueError):
            last = int((self.directory / "port").read_text())
            if 0 < last < _PORTS and not _is_taken(last):
                return last
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def _pid_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _spawn(self, command: list[str], **environ: str) -> tuple[subprocess.Popen[bytes], int]:
        """Start a program; return it, and where in the log its output begins."""
        with suppress(FileNotFoundError):
            if self._log.stat().st_size > _MAX_LOG_BYTES:
                self._log.unlink()
        log = self._open(self._log, os.O_APPEND)
        try:
            log_start = os.fstat(log).st_size
            return self._run_as.popen(command, log=log, **environ), log_start
        finally:
            os.close(log)

    def _log_tail(self, start: int) -> str:
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
            text = "; ".join(
                line.strip() for line in [line for line in lines if line.strip()][-_QUOTED_LINES:]
            )
            return f"{text[-_QUOTED_CHARACTERS:] or 'no output'} (see {self._log})"
        return f"see {self._log}"

    def _open(self, path: Path, flags: int) -> int:
        # Not through a link: as root we write here, and nobody may have put links there.
        flags |= os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        if os.geteuid() == 0:
            os.fchown(descriptor, self._run_as.owner, self._run_as.owner)
        return descriptor


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise EmbeddedError(f"{exc.filename or directory}: {exc.strerror or exc}") from exc


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ready(pid_file: list[str]) -> bool:
    return len(pid_file) > _PID_FILE_STATE and pid_file[_PID_FILE_STATE].strip() == "ready"


def _servers(data: Path) -> list[int]:
    """Return PostgreSQL's processes on this data: a server, or what a killed one left behind.

    They work in their data directory and a zombie in none, so this cannot name a stranger
    that got a dead server's number. Where there is no /proc it finds none.
    """
    home = str(data.resolve())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile, or somebody else's.
        with suppress(OSError):
            if str((process / "cwd").readlink()) == home and (process / "comm").read_text() == "postgres\n":
                found.append(int(process.name))
    return found


def _accepts_connections(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _wait_until(condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise EmbeddedError(complaint)
        time.sleep(_LOOK_AGAIN_S)
