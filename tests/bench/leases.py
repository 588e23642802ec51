"""Run the rules of cluster/lease.py through many random schedules: `make leases N=100000`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.leases import COUNTED, RULES, World

LAST_LINES = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", "--schedules", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule (default: 0)")
    parser.add_argument("--without", choices=RULES, metavar="RULE", help="leave a rule out")
    parser.add_argument("--log", action="store_true", help="print what led to the first stale read")
    parser.epilog = "rules: " + ", ".join(RULES)
    arguments = parser.parse_args()
    if arguments.schedules < 1:
        parser.error("at least one schedule is needed")
    without = (arguments.without,) if arguments.without else ()
    began_s = time.process_time()
    seen: Counter[str] = Counter()
    broken = []
    for seed in range(arguments.seed, arguments.seed + arguments.schedules):
        world = World(seed, without)
        if world.run() is not None:
            broken.append(seed)
        seen.update({name: getattr(world, name) for name in COUNTED})
    cpu_s = time.process_time() - began_s
    print(", ".join(f"{seen[name]:,} {name.replace('_', ' ')}" for name in COUNTED))
    print(f"{arguments.schedules:,} schedules, {arguments.schedules / cpu_s:.0f} a second of CPU time")
    if not broken:
        print("no stale read")
        return 0
    print(f"{len(broken)} schedules with a stale read; seeds: {' '.join(map(str, broken[:20]))}")
    if arguments.log:
        world = World(broken[0], without, log=[])
        world.run()
        print("\n".join((world.log or [])[-LAST_LINES:]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
