"""The three standard streams of a process, whatever whoever started it has made of them.

- Closed (`>&-`): the next file or socket that is opened would get the number of a standard stream, and later
  text for people would go into it. `secure` opens /dev/null in its place, before anything else is opened.
- Full, broken, or without a reader (`/dev/full`, `| head`): what a command prints is its result, so it fails
  with one line and exit code 1 (`OutputFailed`), and never with a traceback. What the standard error does not
  take is lost: no warning is worth a command.
- Without a reader that reads: a result waits for it, as with any command. A complaint waits for a second.
- Non-blocking: another process may have made the pipe so. A result waits for a slow reader all the same.
- Of another encoding: a character that it lacks is written as its escape.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO, cast

from mnemosyned.observe.line_writer import LineWriter, wait_until_writable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_DESCRIPTORS: Final = (0, 1, 2)
_OUTPUT: Final = 1
_ERROR: Final = 2
COMPLAINT_TIMEOUT_S: Final = 1.0


class OutputFailed(Exception):
    """The standard output takes nothing; the text says why."""


class _Output:
    """The standard output, whose errors are OutputFailed: no code that prints takes them for its own."""

    def __init__(self, stream: TextIO, *, is_closed: bool) -> None:
        self._stream = stream
        self._is_closed = is_closed

    def write(self, text: str) -> int:
        if self._is_closed and text:
            raise OutputFailed("standard output is closed")
        try:
            return self._stream.write(text)
        except OSError as exc:
            raise OutputFailed(f"standard output: {exc.strerror}") from exc

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as exc:
            raise OutputFailed(f"standard output: {exc.strerror}") from exc

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class _PatientFile(io.FileIO):
    """A file that is never "temporarily unavailable"."""

    def write(self, content: ReadableBuffer, /) -> int:
        while (count := cast("int | None", super().write(content))) is None:
            wait_until_writable(self.fileno())
        return count


class _Complaints:
    """The standard error, which never fails, and in all holds the process for COMPLAINT_TIMEOUT_S."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._writer: LineWriter | None = None
        self._is_stuck = False

    def write(self, text: str) -> int:
        if sys.is_finalizing():  # a thread that is started now never runs
            return len(text)
        self._writer = self._writer or LineWriter(_ERROR)
        self._writer.put(text)
        if not self._is_stuck:
            self._is_stuck = not self._writer.flush(timeout_s=COMPLAINT_TIMEOUT_S)
        return len(text)

    def flush(self) -> None:
        """Do nothing: what is written is not kept."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def secure() -> None:
    """Open what is closed; have the standard output fail with OutputFailed, and the standard error never."""
    closed = {number for number in _DESCRIPTORS if not _is_open(number)}
    for number in sorted(closed):
        # The lowest free number is the one that is wanted: those below it are open by now.
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
    # Python has None for a stream that was closed.
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    sys.stdout = cast("TextIO", _Output(_patient(sys.stdout), is_closed=_OUTPUT in closed))
    sys.stderr = cast("TextIO", _Complaints(sys.stderr))


def _patient(stream: TextIO) -> TextIO:
    buffer = io.BufferedWriter(_PatientFile(_OUTPUT, "wb", closefd=False))
    is_terminal = stream.isatty()
    return io.TextIOWrapper(buffer, stream.encoding, errors="backslashreplace", line_buffering=is_terminal)


def abandon_output() -> None:
    """Send what the standard output still holds to /dev/null, so that the end of the process is quiet."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
