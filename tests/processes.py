"""The daemon as users run it: a process, its ports, its log."""

from __future__ import annotations

import json
import os
import queue
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import grpc
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from secrecy import search

START_TIMEOUT_S = 30.0


class Daemon:
    """One `mnemosyned` process on free ports, with a production log."""

    def __init__(
        self, *flags: str, environ: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MNEMOSYNED_")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "mnemosyned", "-port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean | (environ or {}),
        )
        self.admin = ""
        self._is_elsewhere = bool(prefix)
        self.context: ssl.SSLContext | None = None  # to ask the admin port over TLS
        self.lines: list[str] = []
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("{"):
                self._events.put(json.loads(line))

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the next log line of this event; lines before it are left behind."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                line = self._events.get(timeout=left_s)
            except queue.Empty:
                break
            if line.get("msg") == event:
                return line
        raise AssertionError(f"no {event!r} in the log:\n{''.join(self.lines)}")

    def serving(self) -> Self:
        """Wait until calls are answered."""
        self._note_where(self.wait_for("serving"))
        return self

    def leased(self) -> Self:
        """Wait until calls are answered from copies too: until the node's lease is valid."""
        self.serving()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not any('"lease_valid"' in line for line in self.lines):
            assert time.monotonic() < deadline_s, "no lease"
            time.sleep(0.02)
        return self

    def listening(self) -> Self:
        """Wait until the ports are open; the storage may not be."""
        self._note_where(self.wait_for("listening"))
        return self

    def _note_where(self, line: dict[str, Any]) -> None:
        self.address: str = line["grpc"]
        self.admin = line["admin"]

    @contextmanager
    def stub(self) -> Iterator[SessionManagerStub]:
        """Lend a client."""
        with grpc.insecure_channel(self.address) as channel:
            yield SessionManagerStub(channel)

    def http(self, path: str) -> tuple[int, str]:
        """Ask the admin port."""
        try:
            with urllib.request.urlopen(self.admin + path, timeout=5, context=self.context) as response:  # noqa: S310  # ours
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        if self.process.poll() is None:
            self._search_metrics()
            self.process.send_signal(number)
        return self.end()

    def _search_metrics(self) -> None:
        # Not over a network that a test may have cut, nor where this process lacks what TLS needs.
        if self.admin and not self._is_elsewhere:
            with suppress(OSError):
                search(self.http("/metrics")[1], "a daemon's metrics")

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(30)
        self._reader.join(5)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        search(self.log, "a daemon's log")
        search(self.out, "a daemon's standard output")
        return code

    @property
    def log(self) -> str:
        """Everything on standard error so far."""
        return "".join(self.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self._search_metrics()
            self.process.kill()
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.end()


def mnemosyned(*arguments: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    """Run a command that ends by itself; return its exit code, output and complaints."""
    done = subprocess.run(
        [sys.executable, "-m", "mnemosyned", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | environ,
    )
    assert "Traceback" not in done.stderr
    search(done.stderr, "a command's standard error")
    if arguments[:1] != ("key",):
        # That one prints a new key, once: it is what it is for.
        search(done.stdout, "a command's standard output")
    return done.returncode, done.stdout, done.stderr


def processes_on(directory: Path) -> list[int]:
    """Return the PostgreSQL servers that work in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve().is_relative_to(directory.resolve()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until_gone(directory: Path) -> None:
    deadline_s = time.monotonic() + 15
    while processes_on(directory):
        assert time.monotonic() < deadline_s, f"a server is left on {directory}"
