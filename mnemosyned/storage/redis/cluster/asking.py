"""Asks nodes of a Redis Cluster, on connections of their own, for the slots or for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mnemosyned.storage.redis.cluster import topology as topologies
from mnemosyned.storage.redis.faults import FAULTS, Uncovered, is_refusal
from mnemosyned.storage.redis.link import Command, open_link

if TYPE_CHECKING:
    from mnemosyned.storage.redis.address import Address
    from mnemosyned.storage.redis.cluster.topology import Host, Topology


async def topology_of(address: Address, hosts: Sequence[Host], timeout_s: float) -> Topology:
    """Ask one node after the other for the slots. Raises redis-py's errors, OSError, TimeoutError."""
    failure: Exception = Uncovered("no node of the cluster tells its slots")
    second_best: Topology | None = None
    for host in hosts:
        try:
            questions = ("CLUSTER", "SLOTS"), ("CLUSTER", "INFO")
            slots_reply, info = await replies_of(address, host, timeout_s, questions)
            found = _topology(slots_reply, info, host)
        except FAULTS as exc:
            # Each node has users of its own: another one may take us.
            failure = failure if is_refusal(failure) else exc
            continue
        if b"cluster_state:ok" in info:
            return found
        second_best = second_best or found
    if second_best is None:
        raise failure
    return second_best


async def replies_of(
    address: Address, host: Host, timeout_s: float, commands: Sequence[Command]
) -> list[Any]:
    """Return the replies of one node, of which some may be errors. Raises like `topology_of`."""
    async with asyncio.timeout(timeout_s):
        link = await open_link(address, host, address.login, 0)
        try:
            return await link.call(commands)
        finally:
            await link.close()


def _topology(reply: Any, info: Any, host: Host) -> Topology:  # noqa: ANN401  # as the replies have it
    for one in (reply, info):
        if isinstance(one, Exception):
            raise one
    try:
        return topologies.parse(reply, host)
    except (ValueError, TypeError, IndexError, AttributeError):
        raise Uncovered("a node tells its slots in an unknown form") from None
