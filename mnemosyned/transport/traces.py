"""Spans of calls, sent to an OTLP endpoint: `-tracing.agent.address`, with the extra `otel`.

Off, it costs nothing: the method table is only wrapped when an address is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from mnemosyned import __version__
from mnemosyned.errors import MnemosyneError
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable, UnaryHandler

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_CARRIED: Final = ("traceparent", "tracestate")  # W3C Trace Context
_STOP_TIMEOUT_MS: Final = 3000


class TracingUnavailable(Exception):
    """Tracing was asked for and cannot be had; the text is for the operator."""


class Tracing:
    """Sends spans, in batches and on a thread of its own; an endpoint that is away loses them."""

    def __init__(self, endpoint: str) -> None:
        """Open it. Raises TracingUnavailable without the OpenTelemetry packages."""
        self._provider = _new_provider(endpoint)

    def trace(self, table: MethodTable) -> None:
        """Have every unary method make a span for each call."""
        tracer = self._provider.get_tracer("mnemosyned", __version__)
        for path, method in table.unary.items():
            service, name = path[1:].split("/")
            attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
            begin = _beginner(tracer, path[1:], attributes)
            answer = _traced(method.handle, begin)
            table.add_unary(service, name, answer, max_message_bytes=method.max_message_bytes)

    def context(self, _: Call) -> dict[str, str]:
        """Return the headers by which another node's span continues the current one."""
        from opentelemetry.propagate import inject  # an extra

        headers: dict[str, str] = {}
        inject(headers)
        return {key: value for key, value in headers.items() if key in _CARRIED}

    def close(self) -> None:
        """Send what is left, for at most a few seconds."""
        self._provider.force_flush(_STOP_TIMEOUT_MS)
        self._provider.shutdown()


def _new_provider(endpoint: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # an extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracingUnavailable("tracing needs packages: pip install 'mnemosyned[otel]'") from None
    resource = Resource.create({"service.name": "mnemosyned", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _beginner(tracer: Tracer, name: str, attributes: dict[str, str]) -> Callable[[Call], Span]:
    from opentelemetry.propagate import extract  # an extra
    from opentelemetry.trace import SpanKind

    def begin(call: Call) -> Span:
        carried = {key: value for key in _CARRIED if (value := call.metadata(key))}
        return tracer.start_span(name, extract(carried), SpanKind.SERVER, attributes)

    return begin


def _traced(answer: UnaryHandler, begin: Callable[[Call], Span]) -> UnaryHandler:
    from opentelemetry.trace import use_span  # an extra

    def traced(message: bytes, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
        span = begin(call)
        try:
            result = answer(message, call)
        except Exception as exc:  # the root of a call: becomes its status
            _end_failed(span, exc)
            raise
        if isinstance(result, bytes):
            span.end()
            return result
        return wait(result, span)

    async def wait(result: Coroutine[Any, Any, bytes], span: Span) -> bytes:
        try:
            # Current, so that what this call asks of other nodes continues it.
            with use_span(span, record_exception=False, set_status_on_exception=False):
                response = await result
        except (Exception, asyncio.CancelledError) as exc:
            _end_failed(span, exc)
            raise
        span.end()
        return response

    return traced


def _end_failed(span: Span, exc: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode  # an extra

    # Our own errors' texts are made to be shown; a bug's might hold anything.
    text = str(exc) if isinstance(exc, MnemosyneError) else type(exc).__name__
    span.set_status(Status(StatusCode.ERROR, text))
    span.end()
