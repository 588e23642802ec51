"""Which node of a Redis Cluster is the primary of a slot, as one of them tells it (CLUSTER SLOTS). Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Host: TypeAlias = tuple[str, int]


class Topology:
    """The primaries of all slots, and all nodes."""

    def __init__(self, ranges: Iterable[tuple[int, int, Host]] = (), replicas: Iterable[Host] = ()) -> None:
        """A range has its first slot, its last one, and their primary."""
        self._ranges = sorted(ranges)
        self._firsts = [first for first, _, _ in self._ranges]
        # What nodes have said since, by slot.
        self._moved: dict[int, Host] = {}
        self.replicas = frozenset(replicas)

    def primary(self, slot: int) -> Host | None:
        """Return the primary of a slot; None: nothing is known of one."""
        moved = self._moved.get(slot)
        if moved is not None:
            return moved
        at = bisect_right(self._firsts, slot) - 1
        if at < 0:
            return None
        _, last, host = self._ranges[at]
        return host if slot <= last else None

    @property
    def primaries(self) -> frozenset[Host]:
        """All nodes that have a slot."""
        return frozenset([*(host for _, _, host in self._ranges), *self._moved.values()])

    def moved(self, slot: int, host: Host) -> None:
        """Take note that a node has named another one as the primary of a slot."""
        self._moved[slot] = host


def parse(reply: Sequence[Any], asked: Host) -> Topology:
    """Read the reply to CLUSTER SLOTS of the node `asked`. Raises ValueError, TypeError, IndexError."""
    ranges, replicas = [], []
    for first, last, primary, *others in reply:
        ranges.append((int(first), int(last), _host(primary, asked)))
        replicas += [_host(other, asked) for other in others]
    return Topology(ranges, replicas)


def _host(node: Sequence[Any], asked: Host) -> Host:
    name, port = node[0], int(node[1])
    # A node that does not know its own address, or is not to tell it, is where it was asked.
    text = "" if name is None else name.decode()
    return (text if text not in {"", "?"} else asked[0], port)
