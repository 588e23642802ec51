"""Several processes that share a port, on all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from common import LOAD_CORE
from load import closed
from processes import Daemon
from results import Curve, Result, Skipped

from rows.setting import Bench, at_random, gets, start


def two_workers(bench: Bench) -> Iterator[Result | Curve]:
    """Cached Gets of two workers, against one process; the load takes its part of the cores."""
    usage = subprocess.run(
        [sys.executable, "-m", "mnemosyned", "-help"], capture_output=True, text=True, check=False
    )
    if "-workers" not in usage.stdout + usage.stderr:
        raise Skipped("this release has no -workers")
    cores = os.cpu_count() or 1
    os.sched_setaffinity(0, range(cores))  # the daemons inherit it
    bench.at_end(lambda: os.sched_setaffinity(0, {LOAD_CORE}))
    dsn, count = bench.postgres(), bench.scaled(60_000)
    calls = gets(range(1000))
    rates: dict[int, list[float]] = {}
    for workers in (1, 2):
        with Daemon(f"-postgres.address={dsn}", f"-workers={workers}") as daemon:
            daemon.serving()
            if not rates:
                start([daemon.address], range(1000))
            closed([daemon.address], at_random(calls), 6000)
            rates[workers] = [
                closed([daemon.address], at_random(calls), count, connections=16).rate
                for _ in range(bench.rounds)
            ]
    yield Result(
        name="two workers, cached Get",
        unit="a second",
        values=rates[2],
        limit="one process",
        limits=rates[1],
        # With two cores the load and the workers share them.
        goal=1.7 if cores > 3 else None,
        is_more_better=True,
        note="" if cores > 3 else f"the goal needs 4 cores, and here are {cores}",
    )
    points = [(number, sorted(found)[len(found) // 2]) for number, found in rates.items()]
    yield Curve(name="throughput by workers", x="workers", y="cached Gets a second", points={"Get": points})
