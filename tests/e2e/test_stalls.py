"""Heavy calls of one client, and what another one notices: nothing that it would mind."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from heavy_calls import HeavyCaller
from mnemosynerpc.session_pb2 import GetRequest
from processes import Daemon
from redteam.good_client import GoodClient
from redteam.lab import SERVICE, SUBJECT, own_session

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from stalls import fill, longest_ms  # noqa: E402

MAX_P99_MS = 50.0
# Of the loop's own thread, in one piece, whatever else the machine does: what cannot be cut, with room.
MAX_WORK_MS = 60.0
# PostgreSQL's part in the calls is among it.
MAX_OTHERS_SHARE = 0.5
SECONDS = 1.2
TRIES = 5
HEAVY_CALLS = (
    "packed, zeros",
    "List by 8",
    "SetValue in 10,000",
    "SetValue in one of 10,000 by 16",
    "Start of 3.9 MB",
    "Start of 10,000 entries",
    "Start of 300,000 entries",
    "Get of one field 2,000,000 times",
)


@pytest.fixture(params=["h2", "grpcio"])
def daemon(
    request: pytest.FixtureRequest, postgres_dsn: str, tmp_path: Path
) -> Iterator[tuple[Daemon, Path]]:
    heartbeat = tmp_path / "heartbeat"
    heartbeat.touch()
    environ = {"PYTHONPATH": str(BENCH / "heartbeat"), "HEARTBEAT": str(heartbeat)}
    flags = (f"-grpc.engine={request.param}", f"-postgres.address={postgres_dsn}")
    with Daemon(*flags, environ=environ) as daemon:
        daemon.serving()
        asyncio.run(fill(postgres_dsn))
        yield daemon, heartbeat
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_heavy_calls_do_not_delay_others(daemon: tuple[Daemon, Path]) -> None:
    node, heartbeat = daemon
    message = GetRequest(access_token=own_session(node)).SerializeToString()
    slow: dict[str, list[Seen]] = {}
    with GoodClient(node.address, f"/{SERVICE}/Get", message, wanted=SUBJECT.encode()) as good:
        for name in HEAVY_CALLS:
            # The machine may be busy with other things: the best of some tries.
            tried = [seen(node, good, name, heartbeat)]
            while not is_good(tried[-1]) and len(tried) < TRIES:
                tried.append(seen(node, good, name, heartbeat))
            if not is_good(tried[-1]):
                slow[name] = tried

    assert not slow


class Seen(NamedTuple):
    """What one try has shown."""

    p99_ms: float  # of the good client's calls
    work_ms: float  # the longest in one piece
    others_share: float  # of a core, that other processes took meanwhile


def is_good(seen: Seen) -> bool:
    # Where others take the cores, a call waits for them whatever the daemon does.
    is_busy = seen.others_share > MAX_OTHERS_SHARE
    return (seen.p99_ms <= MAX_P99_MS or is_busy) and seen.work_ms <= MAX_WORK_MS


def seen(daemon: Daemon, good: GoodClient, name: str, heartbeat: Path) -> Seen:
    """Make heavy calls; return what the good client and the event loop notice."""
    with HeavyCaller(name, daemon.address, SECONDS) as caller:
        good.report()
        since_s, before_s = time.monotonic(), others_cpu_s()
        time.sleep(SECONDS)
        report = good.report()
        others_s = others_cpu_s() - before_s
        outcomes = caller.ended()
    # A try in which nothing was heavy would show nothing.
    assert outcomes.total() > 0
    p99_ms = float("inf") if report.failed else report.p99_ms
    return Seen(p99_ms, longest_ms(heartbeat, since_s)[1], others_s / SECONDS)


def others_cpu_s() -> float:
    """Return the CPU time of all processes on the machine but this one and its children."""
    whole = psutil.cpu_times()
    this = psutil.Process()
    times = [one.cpu_times() for one in (this, *this.children(recursive=True))]
    own_s = sum(one.user + one.system + one.children_user + one.children_system for one in times)
    return sum(whole) - whole.idle - whole.iowait - whole.guest - whole.guest_nice - own_s
