"""A storm: every fault that the world knows, drawn at random from its seed, and an end to all of them."""

from __future__ import annotations

from simulation.world import Link, World

from cluster.member import Phase

FAULTS_UNTIL_S = 40.0
CALM_FROM_S = 60.0
FEWEST = 2


def sail_through(world: World, *, nodes: int, faults: int) -> None:
    """Let a cluster grow and faults come and go; at the end none is left."""
    for number in range(nodes):
        world.add(f"n{number}", seeds=["n0", "n1"], offset_s=100.0 * number, rate=1 + number / 100)
    began_s = world.now_s
    for _ in range(faults):
        world.at(began_s + 3.0 + world.rng.random() * FAULTS_UNTIL_S, world.rng.choice(FAULTS), world)
    world.run(CALM_FROM_S)
    world.heal()
    world.link = Link()
    for node in world.running:
        world.unblock(node.name)


def _disturb_links(world: World) -> None:
    rng = world.rng
    world.link = Link(
        max_delay_s=rng.choice([0.001, 0.05]),
        loss=rng.random() * 0.2,
        duplication=rng.random() * 0.2,
        reordering=rng.random() * 0.2,
    )


def _cut_one_way(world: World) -> None:
    source, target = world.rng.sample(_names(world), 2)
    world.cut(source, target)


def _partition(world: World) -> None:
    names = _names(world)
    world.rng.shuffle(names)
    size = world.rng.randrange(1, len(names))
    world.partition(names[:size], names[size:])


def _heal(world: World) -> None:
    world.heal()


def _pause(world: World) -> None:
    world.pause(_any(world), world.rng.random() * 12)


def _block(world: World) -> None:
    name = _any(world)
    world.block(name)
    world.at(world.now_s + world.rng.random() * 12, _unblock, world, name)


def _unblock(world: World, name: str) -> None:
    world.unblock(name)


def _restart(world: World) -> None:
    if len(_names(world)) <= FEWEST:
        return
    name = _any(world)
    world.rng.choice([world.crash, world.vanish])(name)
    world.at(world.now_s + world.rng.random() * 12, _come_back, world, name)


def _come_back(world: World, name: str) -> None:
    if world.nodes[name].is_running:
        return
    address = f"{name}-{world.steps}"
    # A clock may have been set back meanwhile.
    offset_s = world.nodes[name].offset_s - world.rng.choice([0.0, 0.0, 30.0])
    world.add(name, address=address, seeds=_addresses(world), offset_s=offset_s)


def _lose(world: World) -> None:
    if len(_names(world)) > FEWEST:
        world.rng.choice([world.crash, world.vanish, world.leave])(_any(world))


def _gain(world: World) -> None:
    name = f"late{world.steps}"
    world.add(name, seeds=_addresses(world))


FAULTS = [
    _disturb_links,
    _cut_one_way,
    _partition,
    _heal,
    _pause,
    _block,
    _restart,
    _lose,
    _gain,
]


def _names(world: World) -> list[str]:
    return [node.name for node in world.running if node.swim.me.phase != Phase.LEAVING]


def _addresses(world: World) -> list[str]:
    return [node.address for node in world.running]


def _any(world: World) -> str:
    return world.rng.choice(_names(world))
