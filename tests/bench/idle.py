"""Measure what a cluster costs that nobody calls: `make idle`.

Three nodes and a PostgreSQL in place, all on this machine. For each: CPU time as a part of one core, how
often a second one of its threads wakes up, and resident memory. The kernel counts the time exactly
(/proc/PID/task/*/schedstat), so ten seconds are enough.
"""

from __future__ import annotations

import argparse
import compileall
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from clusters import Cluster
from processes import Daemon

from mnemosyned.embedded.server import EmbeddedPostgres

# Nodes join, copies are fetched, and the collector has run: after that nothing changes any more.
SETTLING_S = 5.0
STARTS = 7
ROOT = Path(__file__).parents[2]
PACKAGES = ("aio", "cache", "client", "cluster", "http2", "mnemosyned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="of the daemons, after --")
    options = parser.parse_args()
    compile_packages()
    with tempfile.TemporaryDirectory() as directory, EmbeddedPostgres.start(Path(directory)) as server:
        starts_s = [start_s(server.dsn) for _ in range(STARTS)]
        print(f"start to ready, without peers: {statistics.median(starts_s):.3f} s, median of {STARTS}")
        bare = family(server_pid(directory))
        with Cluster(server.dsn, options.nodes, *options.flags) as cluster:
            cluster.start()
            time.sleep(SETTLING_S)
            pids = {
                f"node {number}": [daemon.process.pid]
                for number, daemon in enumerate(cluster.daemons.values(), 1)
            }
            pids["PostgreSQL"] = family(server_pid(directory)) or bare
            report(pids, seconds=options.seconds, rounds=options.rounds)


def compile_packages() -> None:
    """Compile the modules, as those of an installed daemon are: otherwise each start may do it."""
    for package in PACKAGES:
        compileall.compile_dir(ROOT / package, quiet=1)


def start_s(dsn: str) -> float:
    """Return how long a daemon takes from its start to the line that says that it serves."""
    began_s = time.monotonic()
    with Daemon(f"-postgres.address={dsn}") as daemon:
        daemon.serving()
        return time.monotonic() - began_s


def server_pid(directory: str) -> int:
    (path,) = Path(directory).rglob("postmaster.pid")
    return int(path.read_text().split()[0])


def family(pid: int) -> list[int]:
    """Return a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def report(pids: dict[str, list[int]], *, seconds: float, rounds: int) -> None:
    parts: dict[str, list[float]] = {name: [] for name in pids}
    wakes: dict[str, list[float]] = {name: [] for name in pids}
    for _ in range(rounds):
        before, began_s = {name: spent(some) for name, some in pids.items()}, time.monotonic()
        time.sleep(seconds)
        took_s = time.monotonic() - began_s
        for name, some in pids.items():
            cpu_s, count = spent(some)
            parts[name].append((cpu_s - before[name][0]) / took_s)
            wakes[name].append((count - before[name][1]) / took_s)
    for name, some in pids.items():
        print(
            f"{name}: {statistics.median(parts[name]):.2%} of a core ({min(parts[name]):.2%} to "
            f"{max(parts[name]):.2%}), {statistics.median(wakes[name]):.0f} wake-ups a second, "
            f"{sum(map(resident_mb, some)):.0f} MB"
        )


def spent(pids: list[int]) -> tuple[float, int]:
    """Return the seconds of CPU of all threads, and how often one was put on a core."""
    cpu_ns = count = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            own_ns, _, slices = map(int, path.read_text().split())
            cpu_ns += own_ns
            count += slices
    return cpu_ns / 1e9, count


def resident_mb(pid: int) -> float:
    """Return the resident memory that no other process shares, and the part of this one of what they do."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:" if is_alone(pid) else "Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def is_alone(pid: int) -> bool:
    """Tell whether it is a daemon; PostgreSQL's processes share most of their memory."""
    return "postgres" not in Path(f"/proc/{pid}/comm").read_text()


if __name__ == "__main__":
    main()
