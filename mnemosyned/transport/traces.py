"""Spans of calls, sent to an OTLP endpoint: `-tracing.agent.address`, with the extra `otel`.

    client's span (traceparent) ──> span here, SERVER ── headers ──> span at the token's owner, SERVER

A span begins when a handler gets its call, and ends with the response or the error. It continues the trace
that the caller names in the metadata, in the form of W3C Trace Context. If this node forwards the call, the
item carries this span's headers, so that the owner's span becomes its child.

- Without an address it costs nothing: the method table is wrapped only when an address is given.
- Unary methods of clients and of forwarded calls have spans. Streams have none: a stream between nodes lives
  for hours, and its items have their own.
- Spans leave in batches, on a thread of the library. A call never waits for the endpoint; an endpoint that
  does not answer costs spans, not calls.
- A span names the method and the outcome, never a token, a bag or an address of the storage.

The packages of OpenTelemetry are imported inside functions: they are an extra, and take long to import.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aio.later import Later, Outcome
from mnemosyned import __version__
from mnemosyned.errors import MnemosyneError
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.methods import MethodTable, UnaryHandler

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_CARRIED: Final = ("traceparent", "tracestate")  # W3C Trace Context
_STOP_TIMEOUT_MS: Final = 3000


class TracingUnavailable(Exception):
    """Tracing is configured, and its packages are missing; the text says how to install them."""


class Tracing:
    """Sends spans in batches, on a thread of its own; they are lost while the endpoint is unavailable."""

    def __init__(self, endpoint: str) -> None:
        """Begin to send to an endpoint, host:port or URL; it need not answer yet.

        Only a URL that begins with https:// is dialled over TLS.

        Raises:
            TracingUnavailable: the packages of the extra `otel` are not installed.
        """
        self._provider = _new_provider(endpoint)

    def trace(self, table: MethodTable) -> None:
        """Replace every unary method by one that makes a span for each call.

        The limit for messages is kept. The method's stats begin at zero, so call this before any call.
        """
        tracer = self._provider.get_tracer("mnemosyned", __version__)
        for path, method in table.unary.items():
            service, name = path[1:].split("/")
            attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
            begin = _beginner(tracer, path[1:], attributes)
            handle = _traced(method.handle, begin)
            table.add_unary(service, name, handle, max_message_bytes=method.max_message_bytes)

    def context(self, _: Call) -> dict[str, str]:
        """Return the headers by which another node's span continues the current one; empty outside a span."""
        from opentelemetry.propagate import inject  # an extra

        headers: dict[str, str] = {}
        inject(headers)
        return {key: value for key, value in headers.items() if key in _CARRIED}

    def close(self) -> None:
        """Send what is left, for at most _STOP_TIMEOUT_MS. Blocks: call it on a thread."""
        self._provider.force_flush(_STOP_TIMEOUT_MS)
        self._provider.shutdown()


def carried(call: Call, names: Iterable[str] = _CARRIED) -> dict[str, str]:
    """Return the caller's own trace context, for a node that makes no spans."""
    return {name: value for name in names if (value := call.metadata(name))}


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
    # The daemon closes it itself, late in its stop. At the exit of the process it would block there instead.
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


def _traced(handle: UnaryHandler, begin: Callable[[Call], Span]) -> UnaryHandler:
    def traced(message: bytes, call: Call) -> Encoded | Later[Encoded] | Coroutine[Any, Any, Encoded]:
        span = begin(call)
        try:
            with _current(span):
                result = handle(message, call)
        except Exception as exc:  # the root of a call: becomes its status
            _end_failed(span, exc)
            raise
        if isinstance(result, Later):
            return result.through(partial(_ended, span))
        if isinstance(result, Coroutine):
            return _wait(result, span)
        span.end()
        return result

    return traced


def _current(span: Span) -> AbstractContextManager[object]:
    """Make a span the current one, so that what its call asks of other nodes continues it."""
    from opentelemetry.trace import use_span  # an extra

    return use_span(span, record_exception=False, set_status_on_exception=False)


def _ended(span: Span, outcome: Outcome[Encoded]) -> Outcome[Encoded]:
    """End the span of a call that had to wait, unless it goes on; a step of a Later."""
    if isinstance(outcome, Coroutine):
        return _wait(outcome, span)
    if isinstance(outcome, BaseException):
        _end_failed(span, outcome)
    else:
        span.end()
    return outcome


async def _wait(result: Coroutine[Any, Any, Encoded], span: Span) -> Encoded:
    try:
        with _current(span):
            response = await result
    except (Exception, asyncio.CancelledError) as exc:
        _end_failed(span, exc)
        raise
    span.end()
    return response


def _end_failed(span: Span, exc: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode  # an extra

    # The texts of our own errors are made to be shown. A bug's text may hold anything, also a token.
    text = str(exc) if isinstance(exc, MnemosyneError) else type(exc).__name__
    span.set_status(Status(StatusCode.ERROR, text))
    span.end()
