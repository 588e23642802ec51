from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from collectors import Collector, collecting
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from processes import Daemon


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as one:
        yield one


def test_calls_make_spans_that_continue_the_callers_trace(collector: tuple[Collector, str]) -> None:
    received, address = collector
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with Daemon("-storage=memory", f"-tracing.agent.address={address}") as daemon:
        with daemon.serving().stub() as stub:
            metadata = (("traceparent", f"00-{trace_id}-{parent_id}-01"),)
            new = StartRequest(session=Session(subject_id="s", access_token="hunter2"))
            stub.Start(new, metadata=metadata)
            stub.Get(GetRequest(access_token="hunter2"))
            with pytest.raises(grpc.RpcError):
                stub.Get(GetRequest(access_token="absent"))
        assert daemon.stop() == 0
    start, got, failed = [received.spans.get(timeout=5) for _ in range(3)]

    assert start.name == "mnemosynerpc.SessionManager/Start"
    assert (start.trace_id.hex(), start.parent_span_id.hex()) == (trace_id, parent_id)
    assert got.trace_id.hex() != trace_id
    assert failed.status.message == "mnemosyned: storage: session not found"
    assert "hunter2" not in str([start, got, failed])


def test_a_collector_that_is_away_harms_nothing() -> None:
    with Daemon("-storage=memory", "-tracing.agent.address=127.0.0.1:1") as daemon:
        with daemon.serving().stub() as stub:
            assert stub.Start(StartRequest(session=Session(subject_id="s"))).session.access_token
        assert daemon.stop() == 0
