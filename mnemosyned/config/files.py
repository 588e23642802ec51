"""How the files that settings name are read: what kind of file, whose, how large, and with which text.

Every file that the daemon reads because a setting names it is read here, at the start, at a reload and by
`-check-config`. The checks are those of ssh and PostgreSQL. They stop a user of this machine who is not root
and not the daemon's user.

    what                                      | a file with a secret | any other file
    ------------------------------------------+----------------------+----------------
    no regular file, or too large             | refused              | refused
    others may write it                       | refused              | refused
    it belongs to a third user                | refused              | allowed
    others may read it                        | a warning            | allowed
    others may replace it, by its directory   | a warning            | allowed

- "Others" are the group of the file and all other users.
- A file of root may be read by its group: so the daemon reads it, with a file of Kubernetes (`fsGroup`) or of
  a package. PostgreSQL allows the same.
- A link counts as the file behind it. Kubernetes mounts a secret as a chain of links.
- A directory gives a warning only. Volumes of Kubernetes are open to all users of their pod, who are one.
- A file system without owners shows one mode for all files. Mount it with a mask (docs/security.md).

The file is looked at before it is opened, since opening a device may do something. It is opened without
waiting, since a FIFO would wait for its writer. Then the open file is looked at once more.
"""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The largest are bundles of authorities, of some 300 KB, and 10,000 callers with comments.
MAX_BYTES: Final = 4 * 1024**2
# Some words, or a URL.
MAX_WORDS_BYTES: Final = 64 * 1024
# YAML takes seconds for a megabyte.
MAX_CONFIG_BYTES: Final = 256 * 1024

_ROOT: Final = 0
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ: Final = stat.S_IRGRP | stat.S_IROTH
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class FileRefused(Exception):
    """A file cannot be used; the text is the reason, without the file's name and its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Why a file with a secret is open to other users, and what to do; `event` is for the log."""

    event: str
    path: str
    advice: str


def read_bytes(path: str, *, holds_secret: bool, max_bytes: int = MAX_BYTES) -> bytes:
    """Return a file's content.

    Raises:
        FileRefused: the file cannot be read, or a check of this module refuses it.
    """
    try:
        _check_kind(os.stat(path))  # noqa: PTH116  # the pathlib form is the same call
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:  # noqa: PTH123  # an open file
            found = os.fstat(descriptor)
            _check_kind(found)
            _check_users(path, found, holds_secret=holds_secret)
            content = stream.read(max_bytes + 1)
    except OSError as exc:
        raise FileRefused(exc.strerror or type(exc).__name__) from None
    except ValueError:
        # The name has a NUL.
        raise FileRefused("it is not the name of a file") from None
    if len(content) > max_bytes:
        raise FileRefused(f"it is larger than {max_bytes} bytes")
    return content


def text_of(content: bytes) -> str:
    """Return a file's content as text.

    Raises:
        FileRefused: it is not UTF-8, begins with a byte order mark, or has a control character. Most editors
            show neither, and a secret with one of them is another secret.
    """
    if content.startswith(_BYTE_ORDER_MARK):
        raise FileRefused("it begins with a byte order mark; save it as UTF-8 without one")
    if content.startswith(_UTF16_MARKS):
        raise FileRefused("it is UTF-16; save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise FileRefused("it is not UTF-8") from None
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if "\0" in line:
            raise FileRefused(f"line {number} has a NUL byte")
        if any(_is_control(char) for char in line):
            raise FileRefused(f"line {number} has a control character")
    return text


def words_of(content: bytes) -> list[str]:
    """Return the words of a file. Raises FileRefused, also for a character that is not printable."""
    words = text_of(content).split()
    if not all(word.isprintable() for word in words):
        raise FileRefused("it has a character that is not printable")
    return words


def exposure_of(path: str) -> Exposure | None:
    """Return how a file with a secret is open to other users; None: it is not, or it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116  # as above
        real = Path(path).resolve()
        directories = {Path(path).parent, real.parent}
        open_to_all = [one for one in sorted(directories) if _is_open_to_all(one.stat())]
    except (OSError, ValueError):
        return None
    if _is_readable_by_others(found):
        return Exposure(
            event="secret_file_readable_by_others", path=path, advice=_advice_to_hide(path, found)
        )
    if open_to_all:
        advice = f"chmod o-w {shlex.quote(str(open_to_all[0]))}"
        return Exposure(event="secret_file_replaceable_by_others", path=path, advice=advice)
    return None


def _check_kind(found: os.stat_result) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise FileRefused(f"it is {kind}, not a file")


def _check_users(path: str, found: os.stat_result, *, holds_secret: bool) -> None:
    if holds_secret and found.st_uid not in {_ROOT, os.geteuid()}:
        raise FileRefused(
            f"it belongs to another user ({found.st_uid}); chown {os.geteuid()} {shlex.quote(path)}"
        )
    if found.st_mode & _OTHERS_WRITE:
        raise FileRefused(f"other users may write it; chmod go-w {shlex.quote(path)}")


def _is_readable_by_others(found: os.stat_result) -> bool:
    # In a file of root the group is how the daemon reads it.
    readable = stat.S_IROTH if found.st_uid == _ROOT else _OTHERS_READ
    return bool(found.st_mode & readable)


def _advice_to_hide(path: str, found: os.stat_result) -> str:
    quoted, me = shlex.quote(path), os.geteuid()
    if found.st_uid == me:
        return f"chmod 600 {quoted}"
    if found.st_gid in {os.getegid(), *os.getgroups()}:
        return f"chmod 640 {quoted}"
    return f"chgrp {os.getegid()} {quoted} && chmod 640 {quoted}"


def _is_open_to_all(directory: os.stat_result) -> bool:
    # With the sticky bit, as in /tmp, only the owner of a file may replace it.
    return bool(directory.st_mode & stat.S_IWOTH) and not directory.st_mode & stat.S_ISVTX


def _is_control(char: str) -> bool:
    return (char < " " and char != "\t") or "\x7f" <= char < "\xa0"
