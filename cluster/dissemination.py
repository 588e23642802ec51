"""What to tell the others next: the updates sent least often first, each a bounded number of times.

Source: Das, Gupta, Motivala, "SWIM" (2002), section 4.1: an update that is sent λ·log n times
reaches all but n^-(2λ-2) of n members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.member import State, Update

# A flood of updates beyond this loses those that were sent most often; the hash-checked sync mends it.
MAX_QUEUED: Final = 32_768


class Dissemination:
    """Updates waiting to be piggybacked: at most one for each claim about a member.

    `is_current` tells whether an update is still what this node holds; others are forgotten.
    """

    def __init__(self, is_current: Callable[[Update], bool]) -> None:
        self._is_current = is_current
        self._by_sends: dict[int, dict[tuple[str, str], Update]] = {}
        self._sends: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._sends)

    def put(self, update: Update) -> None:
        """Tell the others, from the first send on."""
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
    # Accusations of one member by several are told apart, else confirmations could not be counted.
    return (update.member.name, update.accuser if update.member.state == State.SUSPECT else "")
