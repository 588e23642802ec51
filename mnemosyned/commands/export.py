"""`mnemosyned export`: write all live sessions of a storage into a file, for `mnemosyned import`.

`sessions/export_file.py` has the form of the file, and `sessions/exporter.py` the walk. The storage is only
read. Daemons may run meanwhile; what they have changed in the end needs a second export without them.

- It holds one page in memory, about 16 MiB at most, whatever the number of sessions.
- The file has tokens, so it is for this user alone, and is not written to a terminal unless it must be.
- A file that is not complete has no last line, and gets no name (`new_file.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TextIO

from mnemosyned import __version__, settings
from mnemosyned.commands import on_storage
from mnemosyned.commands.new_file import FileFailed, new_file
from mnemosyned.commands.progress import Progress
from mnemosyned.config.flags import Section, setting
from mnemosyned.config.parsers import boolean
from mnemosyned.sessions.config import bag_limits
from mnemosyned.sessions.export_file import Header
from mnemosyned.sessions.exporter import export_all
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.hash_keys import key_ids_in

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import FullStore

_HELP: Final = """usage: mnemosyned export [-output=FILE] [-overwrite] [flags]

Write all live sessions of a storage into a file, from which mnemosyned import puts them into another one. The
storage is only read, and daemons may run meanwhile. Takes the daemon's flags, environment and file, and uses
those of the storage: -storage, -postgres.…, -redis.…, -bag.….

  -output=FILE   the file, for this user alone; without it or with -: the standard output
  -overwrite     replace the file if there is one

The file has the tokens of users: keep it as you keep the storage. Damaged and expired sessions are left out
and counted; the damaged are listed on the standard error, by a fingerprint.

Exit codes: 0 exported, 1 failed, 2 wrong flags, 130 interrupted.

example: mnemosyned export -storage=postgres -postgres.address.file=address -output=sessions.jsonl
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(Section):
    """Where the sessions go."""

    TITLE = "Export"
    EXAMPLE = "mnemosyned export -output=sessions.jsonl"

    output: str = setting("output", "", str, "file; -: the standard output")
    may_overwrite: bool = setting("overwrite", "false", boolean, "replace the file if there is one")


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 exported, 1 failed, 2 wrong flags."""
    return on_storage.command(argv, _HELP, _parsed, _body)


def _parsed(argv: Sequence[str]) -> Config:
    config = settings.parse(argv, os.environ, ExportConfig)
    on_storage.check_movable(config, "export")
    return config


def _body(config: Config) -> int:
    output = config[ExportConfig].output
    if output in {"", "-"}:
        if not output and sys.stdout.isatty():
            return on_storage.complain(
                "the file has tokens: name it with -output=FILE, or -output=- to show them", 2
            )
        return _run(config, sys.stdout.write)
    return _to_file(output, config)


def _to_file(path: str, config: Config) -> int:
    try:
        with new_file(path, may_replace=config[ExportConfig].may_overwrite) as file:
            code = _run(config, file.write)
            if code:
                # What went wrong has been told.
                file.discard()
            return code
    except FileFailed as exc:
        return on_storage.complain(str(exc), 1)


def _run(config: Config, write: Callable[[str], object]) -> int:
    return on_storage.run(config, partial(_export, config=config, write=write, people=sys.stderr))


async def _export(store: FullStore, *, config: Config, write: Callable[[str], object], people: TextIO) -> int:
    header = Header(
        engine=config[StorageConfig].name,
        version=__version__,
        exported_at_us=await store.now_us(),
        hmac_key_ids=tuple(sorted(await key_ids_in(store))),
    )
    progress = Progress("sessions exported", people)
    summary = await export_all(
        store,
        header,
        bag_limits(config).of_stored(),
        write=write,
        complain=lambda text: people.write(f"{text}\n"),
        progress=progress.at,
    )
    progress.end()
    people.write(
        f"{summary.sessions} sessions exported, {summary.expired} expired and {summary.damaged} damaged "
        "left out\n"
    )
    return 0
