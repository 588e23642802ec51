from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from processes import Daemon


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: queue.Queue[Any] = queue.Queue()

    def Export(self, request: Any, _: Any) -> Any:  # noqa: ANN401, N802  # the library's
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    one = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield one, f"127.0.0.1:{port}"
    server.stop(None)


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
