"""`mnemosyned check`: find the sessions whose stored form is damaged, and remove them with `-fix`.

A daemon answers such a session with DATA_LOSS and leaves it out of List (`sessions/damage.py`). This command
asks the same questions of every session, page by page in the order of the stored keys:

    page of sessions ──> the damaged among them ──> one line each
                                    └── -fix ──> removed, if unchanged since they were read

- It holds one page in memory, about 16 MiB at most. What is too long is not read.
- It may run while daemons do, and may be ended and run again.
- A session that is mended, replaced or read by a daemon between the two steps has another version, and stays.
- Sessions that another HMAC key has hashed are checked too: nothing here depends on their tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from mnemosyned import settings
from mnemosyned.commands import on_storage
from mnemosyned.config.flags import ConfigError
from mnemosyned.sessions import damage
from mnemosyned.sessions.config import bag_limits
from mnemosyned.sessions.damage_log import shown
from mnemosyned.storage.engines import StorageConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.bag import BagLimits
    from mnemosyned.sessions.store import CheckableStore, FullStore

_PAGE: Final = 1000
_FIX_FLAGS: Final = {"-fix": True, "-fix=true": True, "-fix=false": False}

_HELP: Final = """usage: mnemosyned check [-fix] [flags]

Find the sessions whose stored form is damaged: those that a daemon answers with DATA_LOSS. Prints a line for
each, with its session id or a fingerprint of its token, and the reason. Takes the daemon's flags, environment
and file, and uses those of the storage: -postgres.…, -token.…, -bag.…. Daemons may run meanwhile.

  -fix    remove the damaged sessions, unless they have changed since they were read

Exit codes: 0 no damaged session is left, 1 some are or the check failed, 2 wrong flags.

example: mnemosyned check -postgres.address.file=address
"""


@dataclass(slots=True)
class Counts:
    """What one run has met."""

    checked: int = 0
    damaged: int = 0
    removed: int = 0


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 0 no damage is left, 1 some is or it failed, 2 wrong flags."""
    if {"-h", "-help", "--help"} & set(argv):
        sys.stdout.write(_HELP)
        return 0
    try:
        config, is_fixing = _parsed(argv)
    except ConfigError as exc:
        return on_storage.complain(str(exc), 2)
    if config[settings.RunConfig].only_checks:
        sys.stdout.write("the configuration is valid\n")
        return 0
    limits = bag_limits(config).of_stored()
    return on_storage.run(config, partial(_report, limits=limits, is_fixing=is_fixing))


def _parsed(argv: Sequence[str]) -> tuple[Config, bool]:
    is_fixing = False
    others = []
    for argument in argv:
        # One dash or two, as all flags.
        one_dash = argument.removeprefix("-") if argument.startswith("--") else argument
        if one_dash in _FIX_FLAGS:
            is_fixing = _FIX_FLAGS[one_dash]
        elif one_dash.startswith("-fix="):
            raise ConfigError("flag -fix: expected true or false")
        else:
            others.append(argument)
    config = settings.parse(others, os.environ)
    on_storage.check_durable(config, "check")
    storage = config[StorageConfig]
    if not storage.engine.capabilities.can_check:
        raise ConfigError(f"check cannot walk through the sessions of -storage={storage.name}")
    return config, is_fixing


async def _report(store: FullStore, *, limits: BagLimits, is_fixing: bool) -> int:
    counts = await check_all(store, limits, is_fixing=is_fixing, write=sys.stdout.write)
    text = f"{counts.checked} sessions checked, {counts.damaged} damaged"
    if is_fixing:
        text += f", {counts.removed} removed"
    if is_fixing and counts.removed < counts.damaged:
        text += "; the others have changed meanwhile: run the command again"
    sys.stdout.write(f"{text}\n")
    return 0 if counts.removed == counts.damaged else 1


async def check_all(
    store: CheckableStore, limits: BagLimits, *, is_fixing: bool, write: Callable[[str], object]
) -> Counts:
    """Check every stored session; with `is_fixing`, remove the damaged ones that have not changed.

    Raises:
        StorageUnavailable: no answer, or a session that another writer held for too long.
    """
    counts = Counts()
    least = ""
    while page := await store.stored_from(least, limit=_PAGE):
        counts.checked += len(page)
        reason_by_key = {
            one.stored_key: reason for one in page if (reason := damage.reason_against(one.found, limits))
        }
        counts.damaged += len(reason_by_key)
        removed: set[str] = set()
        if is_fixing and reason_by_key:
            damaged = [one for one in page if one.stored_key in reason_by_key]
            removed.update(await store.remove_unchanged(damaged))
        counts.removed += len(removed)
        for stored_key, reason in reason_by_key.items():
            outcome = " (removed)" if stored_key in removed else " (changed, kept)" if is_fixing else ""
            write(f"{shown(stored_key)}  {reason}{outcome}\n")
        # The least key that is greater.
        least = page[-1].stored_key + "\0"
    return counts
