"""The calls of one connection: a request of HTTP/2 becomes a call of gRPC, and its outcome an answer.

    Connection (h2_connection.py) ── calls with news ──> `take`
                                                            |  complete
                                                            v
         ┌── handler ─── invoke_unary (call.py) <── only_message (frame.py) <── `begin`
         |
         ├── at once ──────────> `answer` ──┐
         ├── a Later ────────────> `answer` ──┤
         └── a coroutine: task ─> `answer` ─┴──> ServerConnection (http2/server.py), whose output is sent soon

A cached Get is answered within `take`, without a task or a thread. A call that must wait gets a task, which
is cancelled when the client resets the stream or is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

from aio import later, slices
from aio.later import Later
from aio.slices import SlicesFull
from aio.steps import Steps
from http2.messages import HEADER_BYTES, announced_bytes, framed, head, only_message
from http2.outbox import Headers
from http2.server import ServerConnection
from mnemosyned.errors import MessageTooLarge, MnemosyneError, Overloaded, Unimplemented
from mnemosyned.transport.call import (
    UNKNOWN_METHOD,
    ClientGone,
    Failure,
    Outcome,
    fail,
    failure_of,
    invoke_stream,
    invoke_unary,
    refuse,
)
from mnemosyned.transport.h2_call import (
    CONTENT_TYPE,
    GRPC,
    Call,
    UnaryWork,
    Way,
    failure_headers,
    frame_reader,
    is_grpc_type,
    owner_trailers,
    status_headers,
)
from mnemosyned.transport.h2_server import Server
from mnemosyned.transport.h2_streams import ExchangeWork, Streaming, StreamWork
from mnemosyned.transport.methods import StreamMethod, UnaryMethod

_OK_HEAD: Final[Headers] = [CONTENT_TYPE]
_OK_TRAILERS: Final[Headers] = [(b"grpc-status", b"0")]

_ANSWERS: Final = (bytes, tuple, Failure)
_SHARED_BYTES: Final = 64 * 1024  # from here on a message is sent in pieces, and not copied

_TOO_MANY_LARGE: Final = "mnemosyned: too many large requests are waiting"
_INCOMPLETE: Final = "mnemosyned: too many requests are incomplete"
_PLAIN_TEXT: Final = b"mnemosyned speaks gRPC here; its admin pages are on the next port\n"


class Calls:
    """Begins calls, and answers them; what is to be sent is then in the output of `http`.

    It does not know the connection, except by a call: nothing would free the two of them at once.
    """

    def __init__(self, server: Server, http: ServerConnection[Call]) -> None:
        self._server = server
        self._http = http
        self._answers = http.answers
        self._requests = http.requests
        self._unary = server.unary
        self._max_message_bytes = server.max_message_bytes
        self._loop = asyncio.get_running_loop()

    def take(self, calls: list[Call], connection: Way, now_s: float) -> None:
        """Take calls that have news: begin those that are complete, unless they must wait."""
        for call in calls:
            if call.is_complete and call.work is None and not call.is_reset:
                if self._answers.may_begin(call):
                    self.begin(call, connection, now_s)
            else:
                self._take_part(call, connection)

    def begin(self, call: Call, connection: Way, now_s: float) -> None:
        """Answer a complete request, at once or by a task."""
        call.connection = connection
        method = self._unary.get(call.target)
        if method is None or not call.is_grpc:
            self._begin_other(call)
            return
        message = only_message(call.body)
        limit_bytes = method.max_message_bytes or self._max_message_bytes
        if message is None or len(message) > limit_bytes:
            try:
                size_bytes = len(call.body)
                steps = self._reading_only(call, limit_bytes)
                next(steps)
            except StopIteration as end:
                message = end.value
            except MnemosyneError as exc:
                self._refuse_body(method, call, exc)
                return
            else:
                call.work = UnaryWork(self._loop.create_task(self._read_on(method, call, steps, size_bytes)))
                return
        outcome = invoke_unary(method, message, call)
        if isinstance(outcome, bytes):
            trailers = _OK_TRAILERS if not call.owner else _ok_trailers(call)
            self._answers.whole(call, _OK_HEAD, framed(outcome), trailers, now_s)
        elif isinstance(outcome, Failure | tuple):
            self._answer(call, outcome)
        else:
            self._answer_later(call, outcome)

    def _answer_later(self, call: Call, outcome: Later[Outcome] | Coroutine[Any, Any, Outcome]) -> None:
        if isinstance(outcome, Later):
            call.work = outcome
            outcome.then(partial(self._take_later, call))
        else:
            call.work = UnaryWork(self._loop.create_task(self._finish(call, outcome)))

    def _take_later(self, call: Call, outcome: later.Outcome[Outcome]) -> None:
        """Answer a call, or go on with it, whose outcome was not known at once."""
        if isinstance(outcome, _ANSWERS):
            self._answer(call, outcome)
            call.connection.flush_soon()
        elif not isinstance(outcome, BaseException):
            self._answer_later(call, outcome)

    async def _read_on(self, method: UnaryMethod, call: Call, steps: Steps[bytes], size_bytes: int) -> None:
        """Read a message that takes more than a step, and answer its call."""
        outcome: Outcome | Later[Outcome] | Coroutine[Any, Any, Outcome]
        try:
            message = await slices.of_loop().run(steps, size_bytes=size_bytes)
        except SlicesFull:
            outcome = self._refused(method, call, Overloaded(_TOO_MANY_LARGE))
        except MnemosyneError as exc:
            outcome = self._refused(method, call, exc)
        else:
            outcome = invoke_unary(method, message, call)
        self._answer(call, await outcome if isinstance(outcome, Coroutine | Later) else outcome)
        call.connection.flush_soon()

    async def _finish(self, call: Call, working: Coroutine[Any, Any, Outcome]) -> None:
        self._answer(call, await working)
        call.connection.flush_soon()

    def _answer(self, call: Call, outcome: Outcome) -> None:
        if call.is_reset or call.is_answered:
            return
        now_s = time.monotonic()
        if isinstance(outcome, bytes) and len(outcome) < _SHARED_BYTES:
            self._answers.whole(call, _OK_HEAD, framed(outcome), _ok_trailers(call), now_s)
        elif isinstance(outcome, Failure):
            self._send_failure(call, outcome)
        else:
            # In pieces, so that they are not copied before they are sent, which may be a while.
            pieces = (outcome,) if isinstance(outcome, bytes) else outcome
            self._answers.head(call, 200, _OK_HEAD)
            self._answers.part(call, (head(pieces), *pieces), now_s)
            self._answers.end(call, _ok_trailers(call))
            self._server.relieve()

    def _take_part(self, call: Call, connection: Way) -> None:
        """Take the beginning of a request, a part of one that streams, or a reset."""
        if call.is_reset:
            cancel(call)
        elif isinstance(call.work, Streaming):
            call.work.feed(bytes(self._requests.take_body(call)))
            self._server.relieve_requests()
        elif call.work is None and not call.is_answered:
            call.connection = connection
            method = self._unary.get(call.target)
            self._requests.count_incomplete(call)
            if method is None:
                self._begin_other(call)
            elif call.body or call.is_refused:
                self._check_incomplete(method, call)
            self._server.relieve_requests()

    def _check_incomplete(self, method: UnaryMethod, call: Call) -> None:
        """Refuse a request as soon as it is known to be too large; its rest need not come."""
        limit_bytes = method.max_message_bytes or self._max_message_bytes
        if call.is_refused:
            self._refuse_body(method, call, Overloaded(_INCOMPLETE))
        elif announced_bytes(call.body) > HEADER_BYTES + limit_bytes:
            text = f"mnemosyned: message is larger than {limit_bytes} bytes"
            self._refuse_body(method, call, MessageTooLarge(text))

    def _reading_only(self, call: Call, limit_bytes: int) -> Steps[bytes]:
        """Return the message of a body that is compressed, too large or damaged. Raises what is wrong."""
        if call.is_refused:
            raise Overloaded(_INCOMPLETE)
        return frame_reader(call, limit_bytes).reading_only(self._requests.take_body(call))

    def _refuse_body(self, method: UnaryMethod, call: Call, exc: MnemosyneError) -> None:
        self._send_failure(call, self._refused(method, call, exc))

    def _refused(self, method: UnaryMethod, call: Call, exc: MnemosyneError) -> Failure:
        # `invoke_unary` was not reached, so the call is counted here: `fail` counts it out.
        method.stats.begin()
        return fail(method, call, exc, time.perf_counter())

    def _begin_other(self, call: Call) -> None:
        """Begin a call whose method streams, or refuse what is no call of ours."""
        stream = self._server.streams.get(call.target)
        if call.method != b"POST":
            self._answer_plainly(call, 405, [(b"allow", b"POST")])
        elif not is_grpc_type(call.header(b"content-type") or b""):
            self._answer_plainly(call, 415, [(b"accept-post", GRPC)])
        elif not call.is_grpc:
            method = self._unary.get(call.target)
            if method is None:
                self._send_failure(call, refuse(call, call.objection()))
            else:
                self._refuse_body(method, call, call.objection())
        elif stream is None:
            self._send_failure(call, refuse(call, Unimplemented(UNKNOWN_METHOD)))
        else:
            self._begin_stream(stream, call)

    def _begin_stream(self, method: StreamMethod, call: Call) -> None:
        reader = frame_reader(call, method.max_message_bytes or self._max_message_bytes)
        self._requests.count_incomplete(call)
        if method.begin is not None:
            exchange = ExchangeWork(method, call, reader, self)
            call.work = exchange
            exchange.begin(method.begin)
            exchange.feed(bytes(self._requests.take_body(call)))
            return
        work = StreamWork(call, reader)
        work.feed(bytes(self._requests.take_body(call)))
        call.work = work
        work.task = self._loop.create_task(self._run_stream(method, call, work))

    async def _run_stream(self, method: StreamMethod, call: Call, work: StreamWork) -> None:
        try:
            failure = await invoke_stream(method, work.messages(), call, work.send)
        except ClientGone:
            return
        self.end_stream(call, failure)
        call.connection.flush_soon()

    def end_stream(self, call: Call, failure: Failure | None) -> None:
        """See Sender."""
        if call.is_reset:
            return
        if failure is not None and not call.is_answered:
            self._send_failure(call, failure)
        else:
            if not call.is_answered:
                self._answers.head(call, 200, _OK_HEAD)
            self._answers.end(call, _OK_TRAILERS if failure is None else status_headers(failure))

    def send_part(self, call: Call, message: bytes) -> None:
        """See Sender."""
        if not call.is_answered:
            self._answers.head(call, 200, _OK_HEAD)
        self._answers.part(call, (framed(message),), time.monotonic())

    def expel(self, reason: str) -> None:
        """Answer all that are open with UNAVAILABLE."""
        failure = failure_of(Overloaded(reason))
        for call in list(self._http.streams.values()):
            cancel(call)
            if not call.is_answered:
                self._send_failure(call, failure)
            elif isinstance(call.work, Streaming) and not call.is_ended:
                # A reset would look like the client's own cancelling.
                self._answers.end(call, status_headers(failure))
            else:
                self._http.cancel(call)

    def cancel_all(self) -> None:
        """Stop all work for the client."""
        for call in list(self._http.streams.values()):
            cancel(call)

    def _send_failure(self, call: Call, failure: Failure) -> None:
        headers = failure_headers(failure)
        if call.owner:
            headers = [*headers, *owner_trailers(call.owner)]
        self._answers.head(call, 200, headers, ends=True)

    def _answer_plainly(self, call: Call, status: int, headers: Headers) -> None:
        self._answers.head(call, status, [(b"content-type", b"text/plain"), *headers])
        self._answers.part(call, (_PLAIN_TEXT,), time.monotonic())
        self._answers.end(call, None)


def cancel(call: Call) -> None:
    """Stop the work for one call."""
    if call.work is not None:
        call.work.cancel()


def _ok_trailers(call: Call) -> Headers:
    return [*_OK_TRAILERS, *owner_trailers(call.owner)] if call.owner else _OK_TRAILERS
