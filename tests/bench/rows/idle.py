"""What nodes cost that no client calls, and how soon a node is ready; `make idle` tells more of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from idle import SETTLING_S, compile_packages, resident_mb, spent, start_s
from results import Result

from rows.setting import Bench


def idle_nodes(bench: Bench) -> Iterator[Result]:
    """An idle node of three: share of a core, and memory; and the start of a node without peers."""
    compile_packages()
    dsn = bench.postgres()
    starts = [start_s(dsn) for _ in range(bench.rounds + 2)]
    yield Result(name="start to ready", unit="s", values=starts, goal=0.15)
    cluster = bench.cluster(dsn, 3)
    time.sleep(SETTLING_S)
    pids = [daemon.process.pid for daemon in cluster.daemons.values()]
    seconds = 5.0 if bench.is_quick else 10.0
    shares = []
    for _ in range(bench.rounds):
        before_s, _ = spent(pids)
        time.sleep(seconds)
        shares.append((spent(pids)[0] - before_s) / seconds / len(pids) * 100)
    yield Result(name="idle node of three, CPU", unit="% of a core", values=shares, goal=0.2)
    sizes = [resident_mb(pid) for pid in pids]
    yield Result(name="idle node of three, memory", unit="MB", values=sizes, goal=60.0)
