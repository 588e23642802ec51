"""All attacks on a build of this checkout, and a table of what came of them: `make redteam`.

It exits with 1 if an attack broke the daemon or did not reach it. As root, all runs in a network namespace
of its own, so that nothing leaves the machine whatever a broken daemon dials.
"""

from __future__ import annotations

import argparse
import os
import sys

from redteam.lab import ATTACKS, ENGINES
from redteam.runner import Laboratory, print_table, selected

_INSIDE = "MNEMOSYNED_REDTEAM_INSIDE"


def main() -> int:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(prog="redteam", description=__doc__)
    parser.add_argument("words", nargs="*", help="only attacks whose kind or name has one of these words")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="both if not said")
    parser.add_argument("--short", action="store_true", help="only the quick attacks, as CI does")
    parser.add_argument("--list", action="store_true", help="list the attacks")
    options = parser.parse_args()
    # Daemons and their clients find the sources by themselves.
    os.environ.pop("PYTHONPATH", None)
    attacks = selected(options.words, options.engine or ENGINES, is_short=options.short)
    if options.list:
        for one, engine in attacks:
            print(f"{engine:7} {one.kind}: {one.name}")
        return 0
    if not attacks:
        parser.error(f"no attack of {len(ATTACKS)} has one of these words")
    with Laboratory(least_s=1.5 if options.short else 3.0) as laboratory:
        rows = laboratory.run(attacks)
    return print_table(rows)


def enter_namespace() -> None:
    """Start again in a network namespace that has loopback alone, if this user may make one."""
    if os.geteuid() != 0 or _INSIDE in os.environ:
        return
    os.environ[_INSIDE] = "1"
    command = 'ip link set lo up && exec "$0" -m redteam "$@"'
    os.execvp(  # noqa: S606  # this very program, by words of its own
        "unshare", ["unshare", "--net", "sh", "-c", command, sys.executable, *sys.argv[1:]]
    )


if __name__ == "__main__":
    enter_namespace()
    sys.exit(main())
