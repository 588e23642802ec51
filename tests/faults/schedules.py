"""What is to fail and when: a list that follows from a seed. Pure."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

# After the last fault begins.
_CALM_S: Final = 1.5
# By then each node serves copies, and has mirrors.
_BEGIN_S: Final = 4.0


class FaultKind(enum.Enum):
    """What can be done to a cluster."""

    KILL = "kill"  # a node, which is started again
    SHORT_STOP = "short-stop"  # SIGSTOP, within what membership forgives
    STOP = "stop"  # SIGSTOP, for longer than that
    STALL = "stall"  # many stops in a row, each shorter than a heartbeat
    PART = "part"  # no packet between two groups of nodes
    ONE_WAY = "one-way"  # no packet from one group to the other
    FLICKER = "flicker"  # parted and joined, again and again
    STORAGE_CUT = "storage-cut"  # a node does not reach the storage
    ISOLATE = "isolate"  # a node reaches its clients only
    STORAGE_RESTART = "storage-restart"
    STORAGE_FREEZE = "storage-freeze"
    FAILOVER = "failover"  # the storage is lost, and a synchronous copy of it takes its place
    ROLLING = "rolling"  # every node is stopped in order and started again
    MEMBERSHIP = "membership"  # a node is added and removed
    LOSSY = "lossy"  # a node's links lose packets
    SLOW = "slow"  # a node's link to the storage is slow, and then cut
    CLOCK = "clock"  # a node's clock steps
    STORAGE_CLOCK = "storage-clock"  # that of the storage steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault; the nodes are numbers. It begins at its time, or when those before it are over."""

    at_s: float
    kind: FaultKind
    nodes: tuple[int, ...] = ()
    others: tuple[int, ...] = ()  # those on the other side of a wall
    lasts_s: float = 0.0
    times: int = 1
    amount: float = 0.0  # a share in percent, seconds of delay, or seconds of a step

    def __str__(self) -> str:
        """Show it for people."""
        words = [f"{self.at_s:6.2f} s  {self.kind.value}", *(f"n{number}" for number in self.nodes)]
        if self.others:
            words += ["from", *(f"n{number}" for number in self.others)]
        words.append(f"for {self.lasts_s:.2f} s")
        if self.times > 1:
            words.append(f"{self.times} times")
        if self.amount:
            words.append(f"by {self.amount:g}")
        return " ".join(words)


def schedule(
    seed: int, kinds: Sequence[FaultKind], *, nodes: int, seconds: float, is_mixed: bool = False
) -> list[Fault]:
    """Return what fails within these seconds; with `is_mixed`, a fault may begin during another one."""
    rng = random.Random(f"{seed} {nodes} {seconds} {[kind.value for kind in kinds]}")
    faults: list[Fault] = []
    at_s = _BEGIN_S
    while at_s < seconds - _CALM_S:
        kind = rng.choice(kinds)
        longest_s = max(0.3, seconds - at_s)
        fault = replace(_MAKERS[kind](rng, nodes, longest_s), at_s=round(at_s, 2))
        faults.append(fault)
        lasts_s = 0.0 if is_mixed else fault.lasts_s * fault.times * (2 if fault.times > 1 else 1)
        # At once, or when nodes have copies again: barred, they have none for four seconds.
        at_s += lasts_s + rng.choice((rng.uniform(0.8, 2.5), rng.uniform(6.0, 8.0)))
    return faults


Maker = Callable[[random.Random, int, float], Fault]


def _one_node(kind: FaultKind, *, least_s: float, most_s: float) -> Maker:
    def make(rng: random.Random, nodes: int, longest_s: float) -> Fault:
        return Fault(
            at_s=0,
            kind=kind,
            nodes=(rng.randrange(nodes),),
            lasts_s=_span(rng, least_s, min(most_s, longest_s)),
        )

    return make


def _stop(rng: random.Random, nodes: int, longest_s: float) -> Fault:
    spans_s = [span_s for span_s in (1.5, 5.0, 15.0) if span_s <= longest_s] or [1.5]
    return Fault(at_s=0, kind=FaultKind.STOP, nodes=(rng.randrange(nodes),), lasts_s=rng.choice(spans_s))


def _short_stop(rng: random.Random, nodes: int, _: float) -> Fault:
    return Fault(at_s=0, kind=FaultKind.SHORT_STOP, nodes=(rng.randrange(nodes),), lasts_s=0.3)


def _stall(rng: random.Random, nodes: int, _: float) -> Fault:
    return Fault(
        at_s=0,
        kind=FaultKind.STALL,
        nodes=(rng.randrange(nodes),),
        lasts_s=_span(rng, 0.03, 0.2),
        times=rng.randint(4, 12),
    )


def _wall(kind: FaultKind) -> Maker:
    def make(rng: random.Random, nodes: int, longest_s: float) -> Fault:
        order = rng.sample(range(nodes), nodes)
        cut = rng.randint(1, nodes - 1)
        return Fault(
            at_s=0,
            kind=kind,
            nodes=tuple(sorted(order[:cut])),
            others=tuple(sorted(order[cut:])),
            lasts_s=_span(rng, 0.8, min(6.0, longest_s)),
        )

    return make


def _flicker(rng: random.Random, nodes: int, longest_s: float) -> Fault:
    wall = _wall(FaultKind.FLICKER)(rng, nodes, longest_s)
    return replace(wall, lasts_s=_span(rng, 0.2, 0.7), times=rng.randint(3, 6))


def _storage(kind: FaultKind, *, least_s: float, most_s: float) -> Maker:
    def make(rng: random.Random, _: int, longest_s: float) -> Fault:
        return Fault(at_s=0, kind=kind, lasts_s=_span(rng, least_s, min(most_s, longest_s)))

    return make


def _membership(rng: random.Random, _: int, __: float) -> Fault:
    return Fault(at_s=0, kind=FaultKind.MEMBERSHIP, lasts_s=_span(rng, 0.5, 3.0))


def _with_amount(maker: Maker, amounts: Sequence[float]) -> Maker:
    def make(rng: random.Random, nodes: int, longest_s: float) -> Fault:
        return replace(maker(rng, nodes, longest_s), amount=rng.choice(amounts))

    return make


def _span(rng: random.Random, least_s: float, most_s: float) -> float:
    return round(rng.uniform(least_s, max(least_s, most_s)), 2)


# Hours, since a lease of the node that is compared with another clock would be seen at once.
_STEPS_S: Final = (-3600.0, -30.0, -2.0, 2.0, 30.0, 3600.0)
_MAKERS: Final[dict[FaultKind, Maker]] = {
    FaultKind.KILL: _one_node(FaultKind.KILL, least_s=0.1, most_s=3.0),
    FaultKind.SHORT_STOP: _short_stop,
    FaultKind.STOP: _stop,
    FaultKind.STALL: _stall,
    FaultKind.PART: _wall(FaultKind.PART),
    FaultKind.ONE_WAY: _wall(FaultKind.ONE_WAY),
    FaultKind.FLICKER: _flicker,
    FaultKind.STORAGE_CUT: _one_node(FaultKind.STORAGE_CUT, least_s=0.8, most_s=6.0),
    FaultKind.ISOLATE: _one_node(FaultKind.ISOLATE, least_s=0.8, most_s=6.0),
    FaultKind.STORAGE_RESTART: _storage(FaultKind.STORAGE_RESTART, least_s=0.0, most_s=2.0),
    FaultKind.STORAGE_FREEZE: _storage(FaultKind.STORAGE_FREEZE, least_s=0.4, most_s=4.0),
    FaultKind.FAILOVER: _storage(FaultKind.FAILOVER, least_s=0.0, most_s=1.0),
    FaultKind.ROLLING: _storage(FaultKind.ROLLING, least_s=0.0, most_s=0.5),
    FaultKind.MEMBERSHIP: _membership,
    FaultKind.LOSSY: _with_amount(_one_node(FaultKind.LOSSY, least_s=1.0, most_s=5.0), (10.0, 25.0, 40.0)),
    FaultKind.SLOW: _with_amount(_one_node(FaultKind.SLOW, least_s=1.0, most_s=5.0), (0.05, 0.2, 0.6)),
    FaultKind.CLOCK: _with_amount(_one_node(FaultKind.CLOCK, least_s=1.0, most_s=5.0), _STEPS_S),
    FaultKind.STORAGE_CLOCK: _with_amount(
        _storage(FaultKind.STORAGE_CLOCK, least_s=1.0, most_s=5.0), _STEPS_S
    ),
}
