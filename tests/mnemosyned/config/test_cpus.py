from __future__ import annotations

import os
from pathlib import Path

import pytest

from mnemosyned.config.cpus import available_cpus
from mnemosyned.config.parsers import workers


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def counted(tmp_path: Path, cgroup: str, files: dict[str, str]) -> int:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text(cgroup)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_cpus(proc, root)


@pytest.mark.parametrize(
    ("cgroup", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/docker/1234\n", {"cpu.max": "400000 100000\n"}, 4),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 8),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, cgroup: str, files: dict[str, str], count: int) -> None:
    assert counted(tmp_path, cgroup, files) == count


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "none", tmp_path) == 8


@pytest.mark.parametrize("text", ["0", "257", "-1", "Auto", "", "2.5"])
def test_a_number_of_workers_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a whole number from 1 to 256, nor auto"):
        workers(text)


def test_auto_is_a_worker_for_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnemosyned.config.parsers.available_cpus", lambda: 3)

    assert (workers("auto"), workers("5")) == (3, 5)
