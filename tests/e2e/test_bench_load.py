"""The bench's own load: it makes as many calls as it says, and charges a server for its stalls."""

from __future__ import annotations

import signal
import sys
import threading
from itertools import cycle
from pathlib import Path

import pytest
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from processes import Daemon

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from load import CALLS_A_CONNECTION, closed, open_loop, request
from results import Result

TOKEN = "t" * 64
GET = request("Get", GetRequest(access_token=TOKEN))
STALL_S = 0.5


def ok_gets(daemon: Daemon) -> float:
    _, page = daemon.http("/metrics")
    wanted = 'grpc_server_requests_total{code="OK",handler="Get"'
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(wanted))


@pytest.mark.slow
def test_all_calls_are_made_on_more_connections_than_one_and_a_stall_counts_for_each_call_in_it() -> None:
    count = 2 * CALLS_A_CONNECTION + 100
    with Daemon("-storage=memory") as daemon:
        with daemon.serving().stub() as stub:
            new = Session(access_token=TOKEN, subject_id="user:1")
            stub.Start(StartRequest(session=new), timeout=5)
        outcome = closed([daemon.address], cycle([GET]), count, connections=1)
        assert len(outcome.latencies_s) == count == ok_gets(daemon)

        stop = threading.Timer(0.5, daemon.process.send_signal, [signal.SIGSTOP])
        go_on = threading.Timer(0.5 + STALL_S, daemon.process.send_signal, [signal.SIGCONT])
        stop.start()
        go_on.start()
        outcome = open_loop([daemon.address], cycle([GET]), rate=1000.0, seconds=2.0)
        go_on.join()

    assert len(outcome.latencies_s) == 2000
    # A quarter of the calls was due in the stall, and most of these waited for a good part of it.
    late = sum(took_s > STALL_S / 4 for took_s in outcome.latencies_s)
    assert late > 200, late


@pytest.mark.parametrize(("values", "is_met"), [([1.0, 9.0, 2.0], True), ([3.0, 9.0, 2.0], False)])
def test_a_goal_is_for_the_median_of_the_ratios(values: list[float], is_met: bool) -> None:  # noqa: FBT001
    result = Result(name="n", unit="us", values=values, limit="echo", limits=[1.0, 1.0, 1.0], goal=2.0)

    assert result.is_met is is_met
    assert ("✓" if is_met else "✗") in result.line
