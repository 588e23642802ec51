"""Where the keys of a Redis Cluster are. Pure.

A cluster keeps each key in one of 16,384 slots, by the part of its name in braces, and a script may touch the
keys of one slot only. Sessions are therefore put into buckets, by a hash of their names:

    mnemosyne:{3}:s:TOKEN   mnemosyne:{3}:x   mnemosyne:{3}:u:SUBJECT …

Each bucket is a small store of its own, with the keys of a single server (`scripts/prelude.lua`) in one
slot. A session and its places in all indexes change in one step, as on a single server. What is not for
named sessions, such as List, asks all buckets.

What is in braces is chosen so that the slots of the buckets are at equal distances: a primary with a third of
the slots has a third of the buckets. The number of buckets is stored, and never changes.

A node that hands a slot over moves its keys one by one, and a script that runs meanwhile would take a key
that is at the other node for one that does not exist. So each script names two keys, one of which never
exists. For a slot that is being moved, a node refuses such a script before it runs (TRYAGAIN, ASK), and the
caller waits until the slot has been moved.
"""

from __future__ import annotations

from binascii import crc_hqx
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from zlib import crc32

SLOTS: Final = 16384
_HOME: Final = "home"


def slot_of(tag: str) -> int:
    """Return the slot of the keys that have this text in braces."""
    return crc_hqx(tag.encode(), 0) % SLOTS


@dataclass(frozen=True)
class Space:
    """The keys that begin with one text, all of them in one slot."""

    prefix: str
    slot: int

    @cached_property
    def keys(self) -> tuple[int, str, str]:
        """What stands before the arguments of a script: two keys, of which the second never exists."""
        return (2, f"{self.prefix}x", f"{self.prefix}none")

    def within(self, part: str) -> Space:
        """Return keys beside those of this space, in the same slot."""
        return Space(self.prefix + part, self.slot) if part else self


def home(prefix: str) -> Space:
    """Return the keys that are not of sessions: the rows of nodes, and what the store is known by."""
    return Space(f"{prefix}{{{_HOME}}}:", slot_of(_HOME))


def buckets(prefix: str, count: int) -> tuple[Space, ...]:
    """Return the keys of each bucket."""
    found: dict[int, Space] = {}
    number = 0
    while len(found) < count:
        tag = str(number)
        slot = slot_of(tag)
        found.setdefault(slot * count // SLOTS, Space(f"{prefix}{{{tag}}}:", slot))
        number += 1
    return tuple(found[place] for place in range(count))


def bucket_of(name: bytes, count: int) -> int:
    """Return the bucket that has the session with this name."""
    return crc32(name) % count
