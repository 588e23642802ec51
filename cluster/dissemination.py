"""Which updates go into the next packet: those that were sent least often. Pure.

Membership has no broadcast. An update rides along with probes and gossip packets ("piggybacked"), and each
member that hears it for the first time passes it on. Source: Das, Gupta, Motivala, "SWIM" (2002), section
4.1: an update that is sent λ·log n times reaches all but n^-(2λ-2) of n members.

Each update is sent a bounded number of times. Updates stand in buckets by the number of their sends. `take`
goes through the buckets from 0 on, so that old updates do not delay new ones. Each update that it takes moves
into the next bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.member import State, Update

# A flood of updates beyond this loses those that were sent most often. The sync of whole tables mends that.
MAX_QUEUED: Final = 32_768


class Dissemination:
    """Updates waiting to be piggybacked: at most one for each claim about a member.

    `is_current` tells whether an update is still what this node holds. One that is not is never sent: there
    is a newer claim about that member, which has an update of its own.
    """

    def __init__(self, is_current: Callable[[Update], bool]) -> None:
        self._is_current = is_current
        # The same updates twice: by how often each was sent, and how often each key was.
        self._by_sends: dict[int, dict[tuple[str, str], Update]] = {}
        self._sends: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._sends)

    def put(self, update: Update) -> None:
        """Send this update from now on; it replaces an older one with the same key."""
        key = _key(update)
        self._remove(key)
        if len(self._sends) >= MAX_QUEUED:
            self._remove(next(iter(self._by_sends[max(self._by_sends)])))
        self._place(key, update, 0)

    def take(self, count: int, *, max_sends: int) -> list[Update]:
        """Return at most `count` updates and count them as sent; one sent `max_sends` times is done."""
        taken: list[tuple[tuple[str, str], Update, int]] = []
        for sends in sorted(self._by_sends):
            for key, update in list(self._by_sends[sends].items()):
                if len(taken) == count:
                    break
                if self._is_current(update):
                    taken.append((key, update, sends + 1))
                else:
                    self._remove(key)
        # Afterwards, so that no update is taken twice into one packet.
        for key, update, sends in taken:
            self._remove(key)
            if sends < max_sends:
                self._place(key, update, sends)
        return [update for _, update, _ in taken]

    def _place(self, key: tuple[str, str], update: Update, sends: int) -> None:
        self._by_sends.setdefault(sends, {})[key] = update
        self._sends[key] = sends

    def _remove(self, key: tuple[str, str]) -> None:
        sends = self._sends.pop(key, None)
        if sends is None:
            return
        bucket = self._by_sends[sends]
        del bucket[key]
        if not bucket:
            del self._by_sends[sends]


def _key(update: Update) -> tuple[str, str]:
    # Each accuser of a suspect has an update of its own. If they replaced one another, the members could not
    # count independent accusers.
    return (update.member.name, update.accuser if update.member.state == State.SUSPECT else "")
