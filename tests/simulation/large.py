"""Changes to a cluster of thousands that has known itself for long."""

from __future__ import annotations

from typing import Final

from simulation.world import Node, World

from cluster.member import Event, EventKind

QUIET_S: Final = 2.0
KIND_BY_NAME: Final = {
    "n1": ("vanished", EventKind.DEAD),
    "n2": ("crashed", EventKind.DEAD),
    "n3": ("left", EventKind.LEFT),
    "newcomer": ("joined", EventKind.ACTIVE),
}
CHANGES: Final = tuple(change for change, _ in KIND_BY_NAME.values())
FEWEST: Final = 5


def change_some(world: World, *, nodes: int, seconds: float) -> dict[str, float]:
    """Lose two nodes, let one go and gain one; return how long each took to be known to all."""
    known_s: dict[str, float] = {}
    heard = dict.fromkeys(CHANGES, 0)
    began_s = 0.0

    def listen(_: Node, event: Event) -> None:
        change, kind = KIND_BY_NAME.get(event.member.name, ("", None))
        if event.kind is not kind:
            return
        heard[change] += 1
        if heard[change] == expected[change]:
            known_s[change] = world.now_s - began_s

    # The node that leaves does not hear of its own end, nor the newcomer of its own coming.
    remaining = nodes + 1 - 3
    expected = dict.fromkeys(CHANGES, remaining) | {"joined": remaining - 1}
    world.add_settled(nodes)
    world.watchers.append(listen)
    world.run(QUIET_S)
    began_s = world.now_s
    world.add("newcomer", seeds=["n0", "n4"])
    world.vanish("n1")
    world.crash("n2")
    world.leave("n3")
    world.run(max(0.0, seconds - QUIET_S))
    return known_s
