"""A clock that is set for one process moves its wall clock, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from clocks import Clock, needs_faketime

pytestmark = needs_faketime
AHEAD_S: Final = (0.0, 3600.0, -3600.0)
_WAIT_S = 0.2
# Waits as Python's threads do for one another: for a condition, by the monotonic clock.
_WAIT = f"""
import ctypes, time
libc = ctypes.CDLL(None)

class Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]

attributes, condition, mutex = (ctypes.create_string_buffer(64) for _ in range(3))
libc.pthread_condattr_init(attributes)
libc.pthread_condattr_setclock(attributes, time.CLOCK_MONOTONIC)
libc.pthread_cond_init(condition, attributes)
libc.pthread_mutex_init(mutex, None)
libc.pthread_mutex_lock(mutex)
began_s = time.monotonic()
seconds, nanoseconds = divmod(int((began_s + {_WAIT_S}) * 1e9), 10**9)
libc.pthread_cond_timedwait(condition, mutex, ctypes.byref(Timespec(seconds, nanoseconds)))
print(time.time(), time.monotonic() - began_s)
"""


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


def waited(clock: Clock) -> tuple[float, float]:
    """Return a process's wall clock after a wait, and how long it waited by its monotonic clock."""
    command = [sys.executable, "-c", _WAIT]
    environ = os.environ | clock.environ
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=20)
    now_s, took_s = map(float, done.stdout.split())
    return now_s, took_s


@pytest.mark.parametrize("ahead_s", AHEAD_S)
def test_a_process_goes_by_its_own_wall_clock(clock: Clock, ahead_s: float) -> None:
    clock.step(ahead_s)

    now_s, _ = waited(clock)

    assert now_s - time.time() == pytest.approx(ahead_s, abs=20)


@pytest.mark.parametrize("ahead_s", AHEAD_S)
def test_a_wait_by_the_monotonic_clock_lasts_as_long_by_any_wall_clock(clock: Clock, ahead_s: float) -> None:
    clock.step(ahead_s)

    _, took_s = waited(clock)

    assert took_s >= _WAIT_S
