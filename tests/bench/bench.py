"""Measure every row of the goals against limits of this machine, measured in the same run: `make bench`.

Servers are pinned to one core and the load to another. Each row has several rounds; a limit (a bare echo, one
statement of asyncpg) takes its turn in each, because the machine is shared. Goals are ratios where they can
be. The results are printed, and written to build/bench.json with the points of the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The root first: tests/ has folders of the same names.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from common import LOAD_CORE
from results import Curve, Result, Skipped
from rows import ROWS, Bench

JSON = Path(__file__).parents[2] / "build" / "bench.json"


@dataclass
class Report:
    """What all rows have measured."""

    results: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        content = {
            "results": [one.as_json() for one in self.results],
            "curves": [asdict(one) for one in self.curves],
            "skipped": self.skipped,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"all, or some of: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="few rounds, small tables: about three minutes")
    parser.add_argument("--rounds", type=int, help="of each row")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--plots", type=Path, help="write plots here; needs the extra bench")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    os.sched_setaffinity(0, {LOAD_CORE})
    report = Report()
    rounds = options.rounds or (2 if options.quick else 5)
    for name in options.rows or ROWS:
        measure(name, report, is_quick=options.quick, rounds=rounds)
    report.write(options.json)
    missed = sum(one.is_met is False for one in report.results)
    print(
        f"\n{len(report.results)} numbers, {missed} goals missed, {len(report.skipped)} rows skipped: ",
        end="",
    )
    print(options.json)
    if options.plots is not None:
        from plots import draw  # noqa: PLC0415  # an extra

        draw(report.curves, options.plots)


def measure(name: str, report: Report, *, is_quick: bool, rounds: int) -> None:
    """Run one row, and print its results as they come."""
    print(f"\n{name}: {(ROWS[name].__doc__ or '').splitlines()[0]}", flush=True)
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        try:
            for found in ROWS[name](Bench(Path(directory), stack, is_quick=is_quick, rounds=rounds)):
                if isinstance(found, Curve):
                    report.curves.append(found)
                else:
                    report.results.append(found)
                    print(f"  {found.line}", flush=True)
        except Skipped as exc:
            report.skipped[name] = str(exc)
            print(f"  skipped: {exc}")
    print(f"  ({time.monotonic() - begun_s:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
