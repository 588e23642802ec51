"""Lose, let go and gain nodes of a large simulated cluster: `make simulate N=10000`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.large import CHANGES, FEWEST, change_some
from simulation.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--nodes", type=int, default=1000)
    parser.add_argument("-s", "--seconds", type=float, default=60.0, help="virtual ones (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="decides everything (default: 1)")
    arguments = parser.parse_args()
    if arguments.nodes < FEWEST:
        parser.error(f"at least {FEWEST} nodes are needed")
    if arguments.seconds <= 0:
        parser.error("the time must be positive")
    began_s = time.process_time()
    world = World(arguments.seed)
    world.checks_invariants = False
    known_s = change_some(world, nodes=arguments.nodes, seconds=arguments.seconds)
    cpu_s = time.process_time() - began_s
    for change in CHANGES:
        heard = f"known to all after {known_s[change]:.2f} s" if change in known_s else "not known yet"
        print(f"a node {change:<12} {heard}")
    packets_s = world.packets / arguments.nodes / arguments.seconds
    print(
        f"{packets_s:.2f} packets a second and node, {world.steps / cpu_s:,.0f} events a second of CPU time"
    )
    mebibytes = getrusage(RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.nodes} nodes, {arguments.seconds:g} s: {cpu_s:.1f} s of CPU time, {mebibytes:.0f} MiB")
    if not world.is_converged():
        print(f"seed {arguments.seed}: the nodes do not all hold the same yet")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
