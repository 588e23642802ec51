"""The scripts that run in the server, each of them one atomic step for a whole batch.

`scripts/*.lua` has them. Each is sent behind `prelude.lua`, which has the keys and how they belong together,
and behind the line of its flags:

- Without `no-writes`, a server refuses all of them when it is a replica, so nothing is read from one.
- With `allow-oom`, it runs what needs next to no memory also when `maxmemory` is reached.

A server knows a script by its hash, once it was loaded, and forgets it when it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.storage.redis.records import stored_name

if TYPE_CHECKING:
    from mnemosyned.storage.redis.link import Command

# What stands before the arguments of a script: how many keys it declares, and the keys.
Keys = tuple[Any, ...]

_DIRECTORY: Final = files(__package__) / "scripts"


@dataclass(frozen=True, slots=True)
class Script:
    """One script; its name is that of the metrics and of the log."""

    name: str
    source: str = field(repr=False)
    sha: str

    def command(self, keys: Keys, arguments: Sequence[str | bytes | int]) -> Command:
        """Return what runs it; `keys` has their number before them."""
        return ("EVALSHA", self.sha, *keys, *arguments)


@dataclass(frozen=True, slots=True)
class Existence:
    """A question for keys, cheaper than a script: how many of them there are."""

    name: str

    def command(self, keys: Keys, arguments: Sequence[str | bytes | int]) -> Command:
        """Return what asks for keys that begin as the first one of `keys` does, without its last letter."""
        prefix = keys[1].removesuffix("x").encode()
        return ("EXISTS", *(prefix + stored_name(str(key)) for key in arguments))


def _script(name: str, *parts: str, needs_memory: bool = False) -> Script:
    flags = "#!lua" if needs_memory else "#!lua flags=allow-oom"
    texts = [(_DIRECTORY / f"{part}.lua").read_text() for part in ("prelude", *parts, name)]
    source = "\n".join([flags, *texts])
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


START: Final = _script("start", needs_memory=True)
LOAD: Final = _script("load")
EXIST: Final = _script("exist")
TOUCH: Final = _script("touch")
ABANDON: Final = _script("abandon")
READ_BAGS: Final = _script("read_bags")
WRITE_BAGS: Final = _script("write_bags", needs_memory=True)
FIND: Final = _script("find", "criteria")
NAMES: Final = _script("names", "criteria")
LIST: Final = _script("list", "criteria")
DELETE: Final = _script("delete", "criteria")
CLEAN_UP: Final = _script("clean_up")
RENAME: Final = _script("rename", needs_memory=True)
WALK: Final = _script("walk")
REMOVE_UNCHANGED: Final = _script("remove_unchanged")
CHECK: Final = _script("check", "identity")
RENEW: Final = _script("renew", "identity")
BAR: Final = _script("bar", "identity")
RESIGN: Final = _script("resign")
MARK: Final = _script("mark")
# On a cluster.
COUNT: Final = _script("count", "criteria")
RECORDS: Final = _script("records")
DEPART: Final = _script("depart", needs_memory=True)
DEPARTED: Final = _script("departed")
ARRIVE: Final = _script("arrive")
FORGET: Final = _script("forget")
ARRIVED: Final = _script("arrived")
WHEREABOUTS: Final = _script("whereabouts")
MEET: Final = _script("meet")
BUCKETS: Final = _script("buckets")
CLEAR: Final = _script("clear")
HAS_INDEX: Final = Existence("has_index")

ALL: Final = tuple(found for found in list(globals().values()) if isinstance(found, Script))
