"""How the texts of settings are read.

Every parser raises ValueError, whose text tells the user what is wrong.

A text that may hold a secret is never repeated in the error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cluster.addresses import is_address
from mnemosyned.config.cpus import available_cpus
from mnemosyned.config.duration import format_duration, parse_duration
from mnemosyned.config.files import MAX_WORDS_BYTES, FileRefused, read_bytes, words_of
from mnemosyned.config.flags import ConfigError

_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_BYTES_BY_UNIT: Final = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_MIN_SECRET: Final = 16
_MAX_SHOWN: Final = 100  # characters of a wrong value


def boolean(text: str) -> bool:
    """Read a Go boolean."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{text!r} is not true or false")


boolean.is_boolean = True  # type: ignore[attr-defined]  # read by `setting`


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a whole number within bounds."""

    def parse(text: str) -> int:
        # No more digits than any number in use: Python refuses thousands of them with a text of its own.
        if not re.fullmatch(r"[+-]?\d{1,20}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"{text[:_MAX_SHOWN]!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


MAX_WORKERS: Final = 256


def workers(text: str) -> int:
    """Read a number of processes, or `auto`: one for each processor that this process may use."""
    if text == "auto":
        return min(available_cpus(), MAX_WORKERS)
    try:
        return integer(1, MAX_WORKERS)(text)
    except ValueError as exc:
        raise ValueError(f"{exc}, nor auto") from None


# A hundred years, far from where instants in microseconds, and the year 9999 of a Timestamp, end.
_MAX_DURATION_S: Final = 100 * 365 * 86400.0


def duration(low_s: float) -> Callable[[str], float]:
    """Return the parser of a Go duration of at least so many seconds, and at most 100 years; in seconds."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < low_s:
            raise ValueError(f"{text!r} is less than {format_duration(low_s)}")
        if not seconds <= _MAX_DURATION_S:
            raise ValueError(f"{text!r} is more than 100 years")
        return seconds

    return parse


def size(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a number of bytes within bounds, with KiB, MiB or GiB."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d{1,20})(KiB|MiB|GiB|)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text[:_MAX_SHOWN]!r} is not a number of bytes such as 4194304, 4MiB or 1GiB")
        size_bytes = int(match[1]) * _BYTES_BY_UNIT[match[2]]
        if not low <= size_bytes <= high:
            raise ValueError(f"{text!r} is not between {low} and {high} bytes")
        return size_bytes

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Return the parser of one word among these."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    parse.choices = choices  # type: ignore[attr-defined]  # read by `setting`
    return parse


def host(text: str) -> str:
    """Read a host name or address to listen on, or `unix:` and the path of a socket."""
    if text.startswith("unix:"):
        if text[5:6] != "/" or any(char.isspace() for char in text):
            raise ValueError(f"{text!r} is not unix: and an absolute path")
        return text
    if not _may_be_host(text):
        raise ValueError(f"{text[:_MAX_SHOWN]!r} is not a host name or address")
    return text


def _may_be_host(text: str) -> bool:
    if not text or not text.isprintable() or any(char.isspace() or char in "[]/" for char in text):
        return False
    try:
        # As the resolver's library does, which raises this for a label that is empty or longer than 63.
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def node_address(text: str) -> str:
    """Read host:port."""
    if not is_address(text):
        raise ValueError(f"{text!r} is not an address of the form host:port")
    return text


def optional_node_address(text: str) -> str:
    """Read host:port, or nothing."""
    return node_address(text) if text else ""


def node_addresses(text: str) -> tuple[str, ...]:
    """Read addresses separated by commas."""
    return tuple(dict.fromkeys(node_address(part) for part in _parts(text)))


def secrets(text: str) -> tuple[str, ...]:
    """Read secrets separated by commas; the error shows none of them."""
    found = tuple(dict.fromkeys(_parts(text)))
    if any(len(secret) < _MIN_SECRET for secret in found):
        raise ValueError(f"a secret is shorter than {_MIN_SECRET} characters; try `openssl rand -hex 32`")
    return found


def host_names(text: str) -> tuple[str, ...]:
    """Read names of hosts separated by commas, also *.domain."""
    found = tuple(dict.fromkeys(_parts(text)))
    for name in found:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_.:-]+", name):
            raise ValueError(f"{name!r} is not a host name, or *. and a domain")
    return found


def label(text: str) -> str:
    """Read a short name without spaces, or nothing."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,63}", text):
        raise ValueError(f"{text!r} is not a label of at most 63 letters, digits, dots, dashes, underscores")
    return text


def file_name(text: str) -> str:
    """Read the name of a file; the error shows nothing, since the text may be what the file should hold."""
    if "://" in text or "\n" in text or "\0" in text or text.startswith(("mnk_", "sha256:")):
        raise ValueError("it is not the name of a file, but perhaps what should be in one")
    return text


def secret_file(text: str) -> str:
    """Read the name of a file with a secret."""
    return file_name(text)


secret_file.is_secret_file = True  # type: ignore[attr-defined]  # read by `setting`


def words_in(flag: str, path: str) -> list[str]:
    """Return the words of the file with a secret that a flag names.

    Raises:
        ConfigError: it cannot be read, a check of files.py refuses it, or it is empty.
    """
    try:
        words = words_of(read_bytes(path, holds_secret=True, max_bytes=MAX_WORDS_BYTES))
    except FileRefused as exc:
        # A word alone may be the secret itself, given to the wrong flag.
        shown = path if "/" in path or Path(path).exists() else "its file"
        raise ConfigError(f"flag -{flag}: {shown}: {exc}") from None
    if not words:
        raise ConfigError(f"flag -{flag}: {path}: it is empty")
    return words


def _parts(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(",")) if part]
