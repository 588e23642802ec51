"""A private PostgreSQL server as our child, for `-postgres.address=embedded:`.

    DIR/data        the cluster            DIR/password    mode 0600
    DIR/port        the last port used     DIR/server.log
    DIR/lock        held by the process that owns the server; others share it

The server gets SIGINT, its fast shutdown, when the thread that started it dies, however it dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from mnemosyned.storage.postgres_programs import (
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
_OLD_SERVER_TIMEOUT_S: Final = 15.0
_LOOK_AGAIN_S: Final = 0.02
_MAX_LOG_BYTES: Final = 10 * 1024 * 1024
_BIND_TRIES: Final = 3
_PR_SET_PDEATHSIG: Final = 1
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
}


def data_directory(address: str, environ: Mapping[str, str]) -> Path:
    """Return the directory that an `embedded:` address names.

    `embedded:` alone is `mnemosyned/postgres` under `$XDG_DATA_HOME` or `~/.local/share`;
    `embedded:///abs/dir` and `embedded:rel/dir` are what they say.
    """
    path = address.removeprefix("embedded:").removeprefix("//")
    if path:
        return Path(path).absolute()
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "mnemosyned" / "postgres"


class EmbeddedPostgres:
    """A running server; `is_owner` tells whether it is our child or somebody else's."""

    @classmethod
    def start(cls, directory: Path, *, binaries: str = "") -> EmbeddedPostgres:
        """Start the server of this directory, or share the one that another process runs.

        Call it from the main thread, before other threads exist.

        Raises:
            EmbeddedError: it cannot be started.
        """
        server = cls(directory, binaries)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            server._attach_or_own()  # our own
        except OSError as exc:
            server.stop()
            raise EmbeddedError(f"{directory}: {exc.strerror or exc}") from exc
        except EmbeddedError:
            server.stop()
            raise
        return server

    def __init__(self, directory: Path, binaries: str) -> None:
        self.directory = directory
        self.port = 0
        self._binaries = binaries
        self._data = directory / "data"
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
        password = (self.directory / "password").read_text().strip()
        return f"postgres://{_USER}:{password}@127.0.0.1:{self.port}/{_DATABASE}"

    @property
    def pid(self) -> int | None:
        """The server's process, if it is ours."""
        return None if self._child is None else self._child.pid

    def exited(self) -> bool:
        """Tell whether our server has ended, though nobody stopped it."""
        return self._child is not None and self._child.poll() is not None

    def restart(self) -> None:
        """Start our server again after it ended, on the same port; it recovers by itself.

        Raises:
            EmbeddedError: it cannot be started.
        """
        if self._child is not None:
            self._child.wait()
        self._run_server()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the server if it is ours: in order, then at once, then by force."""
        child, self._child = self._child, None
        if child is not None:
            for number, wait_s in ((signal.SIGINT, timeout_s), (signal.SIGQUIT, 3.0), (signal.SIGKILL, None)):
                child.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(wait_s)
                    break
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _attach_or_own(self) -> None:
        def is_settled() -> bool:
            return self._take_lock() or self._attach()

        _wait_until(
            is_settled, _READY_TIMEOUT_S, "another process holds the lock, but its server is not ready"
        )
        if not self.is_owner:
            return
        version = self._data / "PG_VERSION"
        major = int(version.read_text()) if version.exists() else None
        self._programs = find_programs(self._binaries, major)
        self._run_as = find_run_as(self._programs, self.directory)
        if major is None:
            self._initialise()
        self._end_old_server()
        self._run_server()

    def _take_lock(self) -> bool:
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
        self.port = int(lines[_PID_FILE_PORT])
        return _accepts_connections(self.port)

    def _initialise(self) -> None:
        # Made aside and renamed when whole: a crash half-way must not leave what looks like data.
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        password = self.directory / "password"
        password.unlink(missing_ok=True)
        descriptor = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
        self._own(password)
        self._run_program(
            "initdb", "-D", str(unfinished), "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password}",
            "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        unfinished.rename(self._data)

    def _run_program(self, name: str, *arguments: str) -> None:
        assert self._programs is not None
        command = [str(self._programs.directory / name), *arguments]
        log = self._open_log()
        try:
            code = self._run_as.popen(command, log=log).wait(_READY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EmbeddedError(f"{name} took more than {_READY_TIMEOUT_S:.0f} s") from None
        finally:
            os.close(log)
        if code:
            raise EmbeddedError(f"{name} failed: {self._last_log_line()}")

    def _end_old_server(self) -> None:
        """Wait for the server of a daemon that was killed; it has its own order to stop already."""
        pid = _old_server(self._pid_file(), self._data)
        if pid is None:
            return

        def is_gone() -> bool:
            return _old_server(self._pid_file(), self._data) is None

        for number in (None, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if number is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            with suppress(EmbeddedError):
                _wait_until(is_gone, _OLD_SERVER_TIMEOUT_S / 3, "")
                return
        raise EmbeddedError(f"the old server, process {pid}, does not end")

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
                (self.directory / "port").write_text(f"{self.port}\n")
                self._own(self.directory / "port")
                return

    def _start_child(self) -> None:
        assert self._programs is not None
        settings = [text for name, value in _SETTINGS.items() for text in ("-c", f"{name}={value}")]
        command = [str(self._programs.directory / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        log = self._open_log()
        try:
            self._child = self._run_as.popen([*command, *settings], log=log, in_child=_die_with_parent())
        finally:
            os.close(log)

        def is_ready() -> bool:
            if self.exited():
                raise EmbeddedError(f"the server ended at its start: {self._last_log_line()}")
            return _is_ready(self._pid_file()) and _accepts_connections(self.port)

        _wait_until(is_ready, _READY_TIMEOUT_S, "the server does not become ready")

    def _free_port(self) -> int:
        with suppress(OSError, ValueError):
            last = self.port or int((self.directory / "port").read_text())
            if not _is_taken(last):
                return last
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def _pid_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _open_log(self) -> int:
        path = self.directory / "server.log"
        with suppress(FileNotFoundError):
            if path.stat().st_size > _MAX_LOG_BYTES:
                path.unlink()
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._own(path)
        return log

    def _last_log_line(self) -> str:
        try:
            lines = (self.directory / "server.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1] if lines else 'no output'} (see {self.directory / 'server.log'})"

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, self._run_as.owner, self._run_as.owner)


def _die_with_parent() -> Callable[[], None] | None:
    """Return what makes a child stop when its parent's thread ends; prepared before the fork."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        # The parent may have died before the order was given.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child


def _is_ready(pid_file: list[str]) -> bool:
    return len(pid_file) > _PID_FILE_STATE and pid_file[_PID_FILE_STATE].strip() == "ready"


def _old_server(pid_file: list[str], data: Path) -> int | None:
    """Return the process of a live server on this data; a stale file names none."""
    try:
        pid = int(pid_file[0])
        os.kill(pid, 0)
    except (IndexError, ValueError, ProcessLookupError):
        return None
    except PermissionError:
        return pid
    directory = Path(f"/proc/{pid}/cwd")
    # A server works in its data directory: another program that got the number does not.
    with suppress(OSError):
        if directory.exists() and directory.resolve() != data.resolve():
            return None
    with suppress(OSError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return None
    return pid


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
