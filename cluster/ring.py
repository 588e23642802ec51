"""Who owns a token: a consistent-hash ring that never changes.

A change of members makes a new ring, which is swapped in one reference; uhashring's own mutation
leaves points behind and is not safe while others read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from uhashring import HashRing

# With 256 points a node the most loaded of 3 to 9 nodes has at most 1.12 times the mean.
_POINTS_PER_NODE: Final = 256
_FINGERPRINT_BYTES: Final = 8


class Ring:
    """The ring of the given nodes; equal sets of names give equal rings, in whatever order.

    Raises:
        ValueError: there is no node.
    """

    __slots__ = ("_ring", "fingerprint", "nodes")

    def __init__(self, nodes: Iterable[str]) -> None:
        self.nodes = tuple(sorted(set(nodes)))
        if not self.nodes:
            raise ValueError("a ring needs a node")
        # 64-bit points: ketama's 32 bits collide, and the order of insertion then decides.
        self._ring = HashRing(nodes=list(self.nodes), vnodes=_POINTS_PER_NODE, hash_fn=_point)
        self.fingerprint = _digest("\n".join((str(_POINTS_PER_NODE), *self.nodes))).hex()

    def owner(self, token: str) -> str:
        """Return the node that owns the token."""
        return str(self._ring.get_node(token))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_FINGERPRINT_BYTES).digest()


def _point(key: str) -> int:
    return int.from_bytes(_digest(key), "big")
