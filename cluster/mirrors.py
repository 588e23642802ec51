"""Mirrors of other nodes' copies: what an owner has granted, and what a node may serve. Pure.

    entry node                                 owner of the token
        |-- Get, forwarded; asks for a grant ---->|  its copy is read often: Grants.grant
        |<-- answer, and for how long ------------|
        |  serves it to the calls that come       |<-- SetValue
        |<-- drop it -----------------------------|  Grants.holders
        |-- dropped ----------------------------->|  acknowledges

`lease.py` has the rules (17 to 21), and the proof. A mirror saves each read the way to the owner, and costs a
write one message. Whether the node may serve it is decided as for its own copies: by its lease, which it
renews anyway. So a mirror that is not written to costs nothing. These are the volume leases of Yin, Alvisi,
Dahlin and Lin (1999), on the leases of Gray and Cheriton (1989).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping

from cluster.lease import stretched
from cluster.view import View

# Views that are remembered to judge mirrors by; an older mirror is not served.
_MAX_VIEWS = 16


class Grants:
    """Which nodes may have a mirror of which token, by this process; at most `max_tokens` tokens.

    A grant is remembered for `keep_us` at least, on clocks that are two percent wrong. For that there are two
    tables, of which the older one is forgotten as a whole.
    """

    def __init__(self, *, max_tokens: int, keep_us: int) -> None:
        self.keep_us = keep_us
        self._max_tokens = max_tokens
        self._period_us = stretched(keep_us)
        # The number of the last grant to each node, by token.
        self._young: dict[str, dict[str, int]] = {}
        self._old: dict[str, dict[str, int]] = {}
        self._turns_us = 0
        self.count = 0  # of all grants

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def grant(self, token: str, node: str, *, now_us: int) -> bool:
        """Record a grant; False: there are too many, and it is none."""
        self._turn(now_us)
        nodes = self._young.get(token)
        if nodes is None:
            if len(self) >= self._max_tokens:
                return False
            nodes = self._young[token] = {}
        self.count += 1
        nodes[node] = self.count
        return True

    def holders(self, tokens: Collection[str]) -> set[str]:
        """Return the nodes that may have a mirror of one of the tokens."""
        found: set[str] = set()
        # Usually there is one token, and no grant of it.
        for table in (self._young, self._old):
            if table:
                for token in tokens:
                    if token in table:
                        found.update(table[token])
        return found

    def dropped(self, tokens: Iterable[str], nodes: Iterable[str], *, count: int) -> None:
        """Take note that nodes have confirmed to have dropped what was granted up to `count`."""
        nodes = list(nodes)
        for token in tokens:
            for table in (self._young, self._old):
                granted = table.get(token)
                if granted is None:
                    continue
                for node in nodes:
                    if granted.get(node, count + 1) <= count:
                        del granted[node]
                if not granted:
                    del table[token]

    def _turn(self, now_us: int) -> None:
        """Forget what was granted longer ago than it may be kept: called before each grant."""
        if now_us < self._turns_us:
            return
        # All of the younger table was granted before `_turns_us`.
        is_older = now_us >= self._turns_us + self._period_us
        self._old, self._young = {} if is_older else self._young, {}
        self._turns_us = now_us + self._period_us


class MirrorHistory:
    """By which rings, and from which processes, this node has had a right to its mirrors.

    The cache that holds the mirrors counts the changes, in its `generation`, and asks `keeps`.
    """

    def __init__(self) -> None:
        """Begin without a view: nothing is kept."""
        self._views: deque[tuple[int, View]] = deque(maxlen=_MAX_VIEWS)
        self._process_by_name: Mapping[str, int] = {}
        self._since_by_name: dict[str, int] = {}  # the generation in which the process was first seen

    def follow(self, view: View, generation: int) -> None:
        """Take the view that this generation has begun with."""
        self._views.append((generation, view))

    def is_new(self, processes: Mapping[str, int]) -> bool:
        """Tell whether these processes are not those that `met` took: then another generation must begin."""
        return processes != self._process_by_name

    def met(self, processes: Mapping[str, int], generation: int) -> None:
        """Take the process of each node with a row, as this generation begins."""
        former = self._process_by_name
        self._since_by_name = {
            name: self._since_by_name[name] if former.get(name) == process else generation
            for name, process in processes.items()
        }
        self._process_by_name = dict(processes)

    def process_of(self, name: str) -> int:
        """Return the process of a node; 0: it has no row."""
        return self._process_by_name.get(name, 0)

    def keeps(self, token: str, generation: int) -> bool:
        """Tell whether one process has owned a token ever since a generation, and this node some token."""
        if not self._views:
            return False
        owner = self._views[-1][1].ring.owner(token)
        if generation < self._since_by_name.get(owner, generation + 1):
            return False
        for begin, view in reversed(self._views):
            if not view.routed or view.ring.owner(token) != owner:
                return False
            if begin <= generation:
                return True
        return False
