"""An OTLP collector of the tests' own."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent: the requests as they came, and their spans."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Any] = queue.Queue()
        self.requests: list[bytes] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: ANN401, N802  # the library's
        metadata = repr(context.invocation_metadata()).encode()
        self.requests.append(request.SerializeToString() + metadata)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Lend a collector and its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    one = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield one, f"127.0.0.1:{port}"
    server.stop(None)
