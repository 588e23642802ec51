"""`mnemosyned import`: put the sessions of a file of `mnemosyned export` into a storage.

    file ── verified as a whole ──> HMAC keys fit ──> nobody runs, if sessions are changed or ended
                                                             │
             with -existing=refuse: none differs <───────────┘
                       │
                       └──> batches (`sessions/importer.py`) ──> -prune ──> nodes that run drop their copies

It may be interrupted and run again: what is there already is met, and counted as such. An interruption waits
for the end of its batch.

Daemons may run on the target while sessions are only added. Before the command ends, each of them drops its
copies, so that none goes on saying that there is no such session. A command that changes or ends sessions of
the target is refused while a daemon runs there: it would undo what users have done since the export.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from mnemosyned import settings
from mnemosyned.commands import on_storage
from mnemosyned.commands.import_source import Contents, Source, SourceFailed, opened
from mnemosyned.commands.progress import Progress
from mnemosyned.config.flags import Section, setting
from mnemosyned.config.parsers import boolean, one_of
from mnemosyned.observe.printable import printable
from mnemosyned.sessions import lease_keeper, row_watch, token_hash
from mnemosyned.sessions.config import bag_limits
from mnemosyned.sessions.damage_log import shown
from mnemosyned.sessions.export_file import BadExport
from mnemosyned.sessions.importer import Counts, Existing, Importer, KeySet, batches
from mnemosyned.sessions.running_nodes import RunningNodes, running_nodes
from mnemosyned.storage.engines import token_hasher
from mnemosyned.storage.hashed import HashedStore

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.model import Session
    from mnemosyned.sessions.store import FullStore
    from mnemosyned.sessions.token_hash import TokenHasher

_INTERRUPTED: Final = 130
_HELP: Final = """usage: mnemosyned import [-input=FILE] [-existing=refuse|skip|replace] [-prune] [flags]

Put the sessions of a file of mnemosyned export into a storage, with their tokens, bags and expiries. Takes
the daemon's flags, environment and file, and uses those of the storage: -storage, -postgres.…, -redis.…,
-token.…, -bag.…. The whole file is verified before anything is written. The command may be run again.

  -input=FILE   the file; without it or with -: the standard input
  -existing=…   if the storage has another session with the same token: refuse (default) imports nothing,
                skip leaves it, replace ends it and takes that of the file
  -prune        afterwards, end what is in the storage and not in the file

Daemons may run on the storage, unless -existing=replace or -prune is given. Tokens are stored as
-token.protection says. Hashed tokens need the HMAC key that has hashed them in -token.key.file.

Exit codes: 0 the storage has all live sessions of the file, 1 it has not, 2 wrong flags, 130 interrupted.

example: mnemosyned import -storage=redis -redis.address.file=address -input=sessions.jsonl
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig(Section):
    """Where the sessions come from, and what becomes of others."""

    TITLE = "Import"
    EXAMPLE = "mnemosyned import -input=sessions.jsonl"

    input: str = setting("input", "", str, "file; -: the standard input")
    existing: str = setting(
        "existing", "refuse", one_of(*(one.value for one in Existing)), "other sessions with the same token"
    )
    is_pruning: bool = setting("prune", "false", boolean, "end what is not in the file")

    @property
    def is_destructive(self) -> bool:
        """Whether sessions of the target may be changed or ended."""
        return self.is_pruning or Existing(self.existing) is Existing.REPLACE


class _Refused(Exception):
    """Nothing, or nothing more, is imported; the text is one line."""


class _Interrupted(Exception):
    """The user has interrupted the command."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 all is there, 1 it is not, 2 wrong flags, 130 interrupted."""
    return on_storage.command(argv, _HELP, _parsed, _body)


def _parsed(argv: Sequence[str]) -> Config:
    config = settings.parse(argv, os.environ, ImportConfig)
    on_storage.check_movable(config, "import")
    return config


def _body(config: Config) -> int:
    path = config[ImportConfig].input
    if not path and sys.stdin.isatty():
        return on_storage.complain("name the file with -input=FILE, or pipe it in", 2)
    try:
        with opened(path, bag_limits(config).of_stored()) as source:
            contents = source.verify()
            hasher = token_hasher(config)
            _check_keys(contents, hasher)
            code = on_storage.run(config, _Import(config, source, contents, hasher).run)
            if code == _INTERRUPTED:
                on_storage.complain("interrupted: the same command goes on with the rest", code)
            return code
    except (BadExport, SourceFailed, _Refused) as exc:
        return on_storage.complain(str(exc), 1)


def _check_keys(contents: Contents, hasher: TokenHasher | None) -> None:
    """Raise _Refused if the target could not find some of the sessions by their tokens."""
    unknown = contents.key_ids - (frozenset() if hasher is None else hasher.key_ids)
    if unknown:
        raise _Refused(
            "the file has tokens that are hashed with another HMAC key: "
            f"-token.key.file must have the keys {', '.join(sorted(unknown))}"
        )


class _Import:
    """One import."""

    def __init__(
        self, config: Config, source: Source, contents: Contents, hasher: TokenHasher | None
    ) -> None:
        self._section = config[ImportConfig]
        self._source = source
        self._sessions = contents.summary.sessions
        self._hasher = hasher
        self._people = sys.stderr
        self._is_interrupted = False

    async def run(self, store: FullStore) -> int:
        """Do all of it; return the exit code. Raises what a storage raises, _Refused, BadExport."""
        # What they say of a lease is of no use here.
        for module in (lease_keeper, row_watch):
            logging.getLogger(module.__name__).setLevel(logging.ERROR)
        loop = asyncio.get_running_loop()
        for number in on_storage.interrupting():
            loop.add_signal_handler(number, self._interrupt, number)
        importer = Importer(
            store,
            store if self._hasher is None else HashedStore(store, self._hasher),
            existing=Existing(self._section.existing),
            complain=self._tell_refused,
        )
        counts, code = importer.counts, 0
        try:
            async with running_nodes(store, "import") as nodes:
                await self._check_target(store, importer, nodes)
                try:
                    await self._move(importer, nodes)
                finally:
                    # Also after an interruption: what was imported is there.
                    if counts.done and nodes.names():
                        await nodes.settle()
        except _Interrupted:
            code = _INTERRUPTED
        sys.stdout.write(f"{_text(counts)}\n")
        return code or int(bool(counts.different or counts.refused or counts.kept))

    def _interrupt(self, number: signal.Signals) -> None:
        self._is_interrupted = True
        # Once more, it ends the process at once.
        asyncio.get_running_loop().remove_signal_handler(number)

    async def _check_target(self, store: FullStore, importer: Importer, nodes: RunningNodes) -> None:
        if self._section.is_destructive:
            _refuse_running(await nodes.look())
        if Existing(self._section.existing) is not Existing.REFUSE:
            return
        if not await store.stored_keys_after("", limit=1):
            return
        different = 0
        for batch in batches(self._source.sessions()):
            self._check_interrupted()
            different += await importer.different(batch)
        if different:
            raise _Refused(
                f"the storage has other sessions with the tokens of {different} of the {self._sessions} in "
                "the file: choose -existing=skip or -existing=replace; nothing was imported"
            )

    async def _move(self, importer: Importer, nodes: RunningNodes) -> None:
        progress = Progress(f"of {self._sessions:,} sessions imported", self._people)
        keys = KeySet()

        def goes_on(batch: Sequence[Session]) -> bool:
            progress.at(importer.counts.done)
            if self._section.is_pruning:
                for session in batch:
                    keys.add(self._key_in_target(session))
            return not self._is_interrupted and not self._unwanted(nodes)

        try:
            await importer.add(self._source.sessions(), goes_on=goes_on)
            await self._before_step(nodes)
            if self._section.is_pruning:
                await importer.prune(keys, partial(self._before_step, nodes))
        finally:
            progress.end()

    async def _before_step(self, nodes: RunningNodes) -> None:
        self._check_interrupted()
        _refuse_running(self._unwanted(nodes))

    def _unwanted(self, nodes: RunningNodes) -> list[str]:
        """Return the nodes that must not run now."""
        return nodes.names() if self._section.is_destructive else []

    def _check_interrupted(self) -> None:
        if self._is_interrupted:
            raise _Interrupted

    def _key_in_target(self, session: Session) -> str:
        key = session.access_token
        if self._hasher is None or token_hash.is_hashed(key):
            return key
        return self._hasher.stored_key(key)

    def _tell_refused(self, session: Session, reason: str) -> None:
        self._people.write(f"{shown(session.access_token)}  {reason}\n")


def _refuse_running(names: Sequence[str]) -> None:
    if names:
        raise _Refused(
            f"daemons run on the storage ({printable(', '.join(names))}): "
            "stop them before -existing=replace or -prune"
        )


def _text(counts: Counts) -> str:
    parts = [f"{counts.imported} sessions imported", f"{counts.there} there already"]
    others = {
        "replaced": counts.replaced,
        "different and left": counts.different,
        "expired since the export": counts.expired,
        "refused": counts.refused,
        "pruned": counts.pruned,
        "changed meanwhile and not pruned": counts.kept,
    }
    return ", ".join([*parts, *(f"{count} {what}" for what, count in others.items() if count)])
