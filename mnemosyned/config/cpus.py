"""How many processors this process may use at once: what `-workers=auto` counts.

Three limits, of which the smallest counts:

- The processors of the host.
- The affinity: `taskset`, CPUAffinity of systemd, the CPU manager of Kubernetes.
- The quota of the control group, or of one above it: `--cpus` of Docker, `limits.cpu` of Kubernetes. A
  process beyond its quota is stopped for the rest of each period, so a quota of 2.5 is two processors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc/self/cgroup")
_ROOT: Final = Path("/sys/fs/cgroup")


def available_cpus(proc: Path = _PROC, root: Path = _ROOT) -> int:
    """Return the number, at least one; the paths are those of Linux."""
    quota = min(_quotas(proc, root), default=math.inf)
    return max(1, min(_affinity(), math.floor(quota) if quota < math.inf else _affinity()))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1


def _quotas(proc: Path, root: Path) -> Iterator[float]:
    """Yield the quotas of this process's control groups, in processors."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the group's path is that of the host, and its files are at the root.
        home = root if not controllers else root / "cpu"
        groups = [home / group.lstrip("/"), *(home / group.lstrip("/")).parents]
        for directory in (*(one for one in groups if one.is_relative_to(home)), home):
            yield from _quota_in(directory)


def _quota_in(directory: Path) -> Iterator[float]:
    try:
        # Version 2: "max 100000" or "150000 100000"
        quota, period = (directory / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)
