"""What the store has of each node, and what a node writes there: the words between leases and stores. Pure.

    lease.py ── Renewal ──> store: one row for each node     renew: write the own row, read all
             <─ Renewed ───
             ── a name ───> store                            bar: raise the epoch of another node's row
             <─ Barred ────

lease.py says what follows from rows. What a store must do atomically is said by its port
(mnemosyned/sessions/store.py), and by rule 1 of lease.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Renewal(NamedTuple):
    """What a node says of itself in its row."""

    name: str
    instance: int  # of one process, random
    number: int  # grows with each renewal of an instance
    ring: str  # the fingerprint of the ring it routes by; empty: it serves no copies
    seen: int  # the epoch for which it has dropped every copy
    replaces: tuple[int, int] = (0, 0)  # instance and number of a lapsed row that it may overwrite


class NodeRow(NamedTuple):
    """One row of the store."""

    name: str
    instance: int
    number: int
    ring: str
    epoch: int  # grows with each bar
    base: int  # the epoch that the row was made with: if it has it still, nobody has barred the node
    seen: int
    age_us: int = 0  # since its renewal, on the store's clock: for people only

    @property
    def version(self) -> tuple[int, int]:
        """Another one after every renewal."""
        return (self.instance, self.number)


class Renewed(NamedTuple):
    """The store's answer to a renewal, also to one that it has refused."""

    rows: tuple[NodeRow, ...]  # of all nodes, as they are after the renewal
    identity: str  # of the store: another one after a copy of it was promoted
    clock_us: int  # the store's clock, microseconds since the epoch


class Barred(NamedTuple):
    """The store's answer to a bar."""

    epoch: int
    instance: int
    number: int
    identity: str
