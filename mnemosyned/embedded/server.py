"""A private PostgreSQL server as a child of this process, for `-postgres.address=embedded:`.

    DIR/lock        locked (flock) by the owner: the process whose child the server is
    DIR/password    of the only user; mode 0600; written before the data
    DIR/data        the database cluster; exists only when it is complete
    DIR/data.new-*  an initdb under way, or one that did not finish
    DIR/port        the last port used, so that a restart keeps the address
    DIR/server.log  output of the programs, at most 10 MB and what one run adds

Owner and guests. The first process to lock DIR/lock owns the server: it runs initdb if there is no data, and
starts, restarts and stops the server. Every other process is a guest: it waits until the owner's server
accepts connections, and shares it. A guest does not take over when the owner ends: its storage is unavailable
until an owner runs again. The kernel releases the lock when the owner dies, however it dies.

Who ends whom:

- The owner stops its child: SIGINT (fast shutdown), SIGQUIT (immediate), SIGKILL.
- If the owner dies by SIGKILL, the kernel sends the child SIGINT (PR_SET_PDEATHSIG, see `programs.py`).
  The signal is bound to the thread that started the child, so that must be the main thread, or one that
  lives until `stop`.
- A new owner may start while the former server still shuts down. It waits 5 s for it, and then sends it the
  same three signals (`_end_old_server`). It never signals a process that does not work in DIR/data.
- The terminal's Ctrl-C does not reach the server, which is in a session of its own.

A crash at any point leaves a state that the next start can use:

- before the password is renamed: `password.new`, which is made again;
- after the password: no data yet, so the next start makes a new password and new data;
- during initdb: `data.new-*`, which is removed. The rename to `data` is the moment at which data exists;
- while the server runs: PostgreSQL recovers from its log, and an acknowledged session is kept;
- with a stale `postmaster.pid`: see `_attach` for guests and `_stale_pid` for the owner.

All of it blocks. A start is made before the event loop runs, and a restart on a thread of its own. `stop` has
a restart that is under way give up.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from mnemosyned.embedded.directory import prepare, take_lock
from mnemosyned.embedded.probes import (
    PID_FILE_PORT,
    accepts_connections,
    is_ready,
    is_taken,
    pid_file,
    servers_on,
)
from mnemosyned.embedded.programs import (
    EmbeddedError,
    Programs,
    RunAs,
    find_programs,
    find_run_as,
)

_LOCK: Final = "lock"
_USER: Final = "mnemosyne"
_DATABASE: Final = "postgres"
# For initdb, for the server's recovery, and for a guest's wait for both.
_READY_TIMEOUT_S: Final = 60.0
_OLD_SERVER_TIMEOUT_S: Final = 5.0  # for each signal
_IMMEDIATE_STOP_TIMEOUT_S: Final = 3.0
_LOOK_AGAIN_S: Final = 0.02
_MAX_LOG_BYTES: Final = 10 * 1024 * 1024
# A free port may be taken between the look and the server's start.
_BIND_TRIES: Final = 3
_PORTS: Final = 2**16
_STOPPED: Final = "the daemon stops"
# Of the log, in an error: the reason, and the lines that PostgreSQL writes after it while it ends.
_QUOTED_LINES: Final = 4
_QUOTED_CHARACTERS: Final = 600
# On the command line and not in postgresql.conf, so that they win over what is in the file, and a user's
# other changes there remain.
_SETTINGS: Final = {
    # Not a Unix socket: its path is limited to about 100 bytes, and a directory may be deeper.
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_destination": "stderr",
    # Without the DETAIL of a failed statement, which quotes the row, and so an access token.
    "log_error_verbosity": "terse",
}


class EmbeddedPostgres:
    """A running server; `is_owner` tells whether it is the child of this process or of another.

    One thread calls `start` and `stop`, and one `restart`, at any time.
    """

    @classmethod
    def start(cls, directory: Path, *, binaries: str = "") -> EmbeddedPostgres:
        """Start the server of this directory, or share the one that another process runs.

        Call it from the main thread, before other threads exist. It blocks until the server accepts
        connections: about 1 s, 3 s with initdb, at most some minutes.

        Raises:
            EmbeddedError: the server cannot be started; the text is one line that says why.
        """
        server = cls(directory.absolute(), binaries)
        try:
            with _translated(directory):
                # As root, everything in it is given to another user (`programs.find_run_as`).
                prepare(server.directory, _LOCK, is_known=server._major() is not None)
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
        self._is_stopping = threading.Event()
        self._restarting = threading.Lock()

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
        """The server's process; None for a guest."""
        return None if self._child is None else self._child.pid

    def exited(self) -> bool:
        """Tell whether this process's server has ended without `stop`; a guest cannot tell: False."""
        return self._child is not None and self._child.poll() is not None

    def restart(self) -> None:
        """Start this process's server again after its end, on the same port; it recovers by itself.

        Guests and the own connection pool know the address only, so the port must not change. Call it from
        a thread that lives until `stop`, and only as the owner. It blocks like `start`.

        Raises:
            EmbeddedError: it cannot be started; a later try may succeed. Or `stop` was called.
        """
        with self._restarting, _translated(self.directory):
            if self._is_stopping.is_set():
                raise EmbeddedError(_STOPPED)
            assert self.is_owner
            self._end_child(0.0)
            self._end_old_server()
            self._start_child()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop the server if this process owns it, then release the lock.

        - SIGINT: the server ends its connections and writes a checkpoint; `timeout_s` to do so.
        - SIGQUIT: it ends without a checkpoint and recovers at its next start; 3 s.
        - SIGKILL, which only a process in uninterruptible sleep survives.
        """
        self._is_stopping.set()
        with self._restarting:
            self._stop_now(timeout_s)

    def _stop_now(self, timeout_s: float) -> None:
        # The lock last: a new owner must not meet a server that is still shutting down.
        self._end_child(timeout_s)
        self._child = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _attach_or_own(self) -> None:
        # The lock again in each round: the former owner may end while this process waits for its server.
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
        lock = take_lock(self.directory / _LOCK)
        if lock is not None:
            self._lock = lock
        return lock is not None

    def _attach(self) -> bool:
        lines = pid_file(self._data)
        if not is_ready(lines):
            return False
        # The file of a server that was killed says "ready" as well. Without /proc, the connection decides.
        if sys.platform == "linux" and int(lines[0]) not in servers_on(self._data):
            return False
        self.port = int(lines[PID_FILE_PORT])
        return accepts_connections(self.port)

    def _initialise(self) -> None:
        # Made beside `data` and renamed when complete: a crash half-way must not leave what looks like data.
        # Each attempt has its own name. An initdb whose daemon was killed may still be removing its files.
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
        # Before the data: after a power failure, data without its password could not be used.
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
                # The whole process group: initdb runs servers of its own.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if code:
            raise EmbeddedError(f"{name} failed: {self._log_tail(log_start)}")

    def _end_old_server(self) -> None:
        """Wait for the server of a killed daemon, or for backends of a killed server, to end.

        They usually end by themselves: the kernel has sent the server SIGINT, and a backend notices the end
        of its server. A new server cannot use their shared memory before. Each signal has 5 s.
        """

        def is_gone() -> bool:
            return not servers_on(self._data)

        no_signal = 0
        for number in (no_signal, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            for pid in servers_on(self._data):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            with suppress(EmbeddedError):
                self._wait_until(is_gone, _OLD_SERVER_TIMEOUT_S, "")
                return
            if self._is_stopping.is_set():
                raise EmbeddedError(_STOPPED)
        raise EmbeddedError(f"the old server, processes {servers_on(self._data)}, does not end")

    def _run_server(self) -> None:
        for is_last in (*[False] * (_BIND_TRIES - 1), True):
            self.port = self._free_port()
            try:
                self._start_child()
            except EmbeddedError:
                # If another process has taken the port meanwhile, the next port may do. Any other error
                # would be the same again.
                if is_last or not is_taken(self.port):
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
            lines = pid_file(self._data)
            is_its_own = is_ready(lines) and int(lines[0]) == child.pid
            return self.exited() or (is_its_own and accepts_connections(self.port))

        complaint = f"the server is not ready after {_READY_TIMEOUT_S:.0f} s"
        try:
            self._wait_until(is_ready_or_ended, _READY_TIMEOUT_S, complaint)
        except EmbeddedError as exc:
            self._end_child(0.0)
            raise EmbeddedError(f"{exc}: {self._log_tail(log_start)}") from None
        if self.exited():
            raise EmbeddedError(f"the server ended at its start: {self._log_tail(log_start)}")

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        _wait_until(lambda: self._is_stopping.is_set() or condition(), timeout_s, complaint)
        if self._is_stopping.is_set():
            raise EmbeddedError(_STOPPED)

    def _stale_pid(self) -> dict[str, str]:
        """Return the environment that makes PostgreSQL ignore the process in a stale `postmaster.pid`.

        Another process may have got the number of the dead server, as in a container, where numbers repeat
        at each start. PostgreSQL would take it for the server and refuse to start. It ignores its
        grandparent, which pg_ctl names by this variable. This is safe on Linux only, where `/proc` has shown
        that no server is left (`_end_old_server`). Elsewhere PostgreSQL decides by itself.
        """
        lines = pid_file(self._data)
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
            if 0 < last < _PORTS and not is_taken(last):
                return last
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def _spawn(self, command: list[str], **environ: str) -> tuple[subprocess.Popen[bytes], int]:
        """Start a program; return it, and the position in the log at which its output begins."""
        # Only between two programs: a running server keeps its descriptor, and would write on unseen.
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
        # O_NOFOLLOW: root writes here, and the user `nobody` can have put a link to another file there.
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
    # A rename survives a power failure only after its directory has been synced.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wait_until(condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise EmbeddedError(complaint)
        time.sleep(_LOOK_AGAIN_S)
