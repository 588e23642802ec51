"""The file that `mnemosyned import` reads: all of it once, before anything relies on it, and then again.

    file ──────────────────> verify: each line, the count, the checksum ──> sessions, as often as needed
    pipe ── kept in TMPDIR ──┘

What comes through a pipe is kept in a file without a name, which ends with this process. Memory holds one
line.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Final

from mnemosyned.sessions import token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.export_file import MAX_LINE_BYTES, Header, Reader, Summary
from mnemosyned.sessions.model import Session

_BUFFER_BYTES: Final = 1024 * 1024
_COPY: Final = "the copy of the input in the directory TMPDIR"


class SourceFailed(Exception):
    """The input cannot be read; the text is one line that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a verified file has."""

    header: Header
    summary: Summary
    key_ids: frozenset[str]  # of the HMAC keys that have hashed its tokens


class Source:
    """One file of sessions."""

    def __init__(self, file: IO[bytes], kept: IO[bytes] | None, limits: BagLimits) -> None:
        """`kept` takes what is read, if the file can be read only once; `limits` are those of stored bags."""
        self._file = file
        self._kept = kept
        self._limits = limits

    def verify(self) -> Contents:
        """Read the whole file. Raises BadExport, SourceFailed."""
        reader = Reader(limits=self._limits)
        key_ids: set[str] = set()
        for session in reader.sessions(self._first_lines()):
            if token_hash.is_hashed(session.access_token):
                key_ids.add(token_hash.key_id_in(session.access_token))
        assert reader.header is not None
        assert reader.summary is not None
        return Contents(header=reader.header, summary=reader.summary, key_ids=frozenset(key_ids))

    def sessions(self) -> Iterator[Session]:
        """Yield the sessions of a verified file. Raises BadExport if it has been changed since."""
        file = self._kept or self._file
        file.seek(0)
        return Reader(limits=self._limits).sessions(_lines(file))

    def _first_lines(self) -> Iterator[bytes]:
        kept = self._kept
        for line in _lines(self._file):
            if kept is not None:
                with _failing(_COPY):
                    kept.write(line)
            yield line
        if kept is not None:
            with _failing(_COPY):
                kept.flush()


@contextmanager
def opened(path: str, limits: BagLimits) -> Iterator[Source]:
    """Open a file, or the standard input for the empty path and `-`. Raises SourceFailed."""
    is_given = path in {"", "-"}
    name = "standard input" if is_given else path
    with ExitStack() as stack:
        with _failing(name):
            descriptor = os.dup(sys.stdin.fileno()) if is_given else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            file = stack.enter_context(os.fdopen(descriptor, "rb", buffering=_BUFFER_BYTES))
        kept = None
        if not file.seekable():
            with _failing(_COPY):
                kept = tempfile.TemporaryFile(buffering=_BUFFER_BYTES)  # noqa: SIM115  # closed below
                stack.callback(_close, kept)
        yield Source(file, kept, limits)


def _close(kept: IO[bytes]) -> None:
    # What it could not write has been told, and would be tried once more.
    with suppress(OSError):
        kept.close()


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    with _failing("the input"):
        while line := file.readline(MAX_LINE_BYTES):
            yield line


@contextmanager
def _failing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise SourceFailed(f"{name}: {exc.strerror}") from exc
