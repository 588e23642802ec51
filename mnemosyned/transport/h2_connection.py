"""One connection of a client, on the daemon's event loop: bytes come in and go out, and it ends.

    transport ── bytes ──> Connection.data_received ──> ServerConnection (http2/server.py) decides
                                                            |  Call: new, complete, with a part, or reset
                                                            v
    transport <── bytes ── `_flush` <────────────────── Calls (h2_calls.py) begins and answers

This module does what `ServerConnection` decides about the connection. What is answered in one turn of the
event loop is written at once.

How a connection ends
---------------------
- When `ServerConnection.is_over`: the last output is written, and this side of the connection is shut. The
  socket is closed when the client has closed it, or after _LINGER_S. Closed earlier, with bytes of the client
  unread, TCP would discard what the client has not read yet: answers, or the GOAWAY that says why.
- By `retire`: the client is asked to open no more streams, and the connection is over after the last one.
- By `expel`: what is left is answered UNAVAILABLE.
- By the client: every task is cancelled.

A client that speaks something else than HTTP/2 gets an answer if it is HTTP/1 (http1.py), and is closed.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, cast

from http2.frames import CLIENT_PREFACE
from http2.server import ServerConnection
from mnemosyned.security.certificates import names_of
from mnemosyned.transport import http1
from mnemosyned.transport.engine import NO_LINGER, UNIX_PEER, host_port
from mnemosyned.transport.h2_backlog import AT_ONCE_BYTES
from mnemosyned.transport.h2_call import Call
from mnemosyned.transport.h2_calls import Calls, cancel
from mnemosyned.transport.h2_server import Server
from mnemosyned.transport.h2_streams import Streaming
from mnemosyned.transport.input_age import InputAge

_LINGER_S: Final = 2.0
_LONG_S: Final = 0.05  # a wait of input that is told to its calls
_AGE_JITTER: Final = 0.1
_HIGH_WATER_BYTES: Final = 256 * 1024  # in the transport, before it asks for a pause


class Connection(asyncio.Protocol):
    """The protocol of one connection."""

    def __init__(self, server: Server, forget: Callable[[], None] = lambda: None) -> None:
        """`forget` is called when the connection is gone."""
        self._server = server
        self._forget = forget
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # before anything else
        self._http: ServerConnection[Call] = None  # type: ignore[assignment]  # with the transport
        self._calls: Calls = None  # type: ignore[assignment]  # with the transport
        self._loop = asyncio.get_running_loop()
        self._first = b""  # before it is known whether the client speaks HTTP/2
        self._is_http2 = False
        self._flush_is_due = False
        self._at_once_bytes = AT_ONCE_BYTES  # so much input is taken without a turn in the backlog
        self._held_since_s = math.inf  # when input began to wait in the backlog, and behind it
        self._age = InputAge()
        self._echoes = 0  # that `_age` knows of
        self._is_writable = True
        self._closing_since_s: float | None = None
        self._certificate_names: tuple[str, ...] | None = None
        self.peer = ""
        self.closed = asyncio.Event()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        address = transport.get_extra_info("peername")
        self.peer = host_port(address[0], address[1]) if isinstance(address, tuple) else UNIX_PEER
        server = self._server
        limits = server.limits
        if limits.max_age_s != math.inf:
            # Not all at once, though they may all have been opened at once.
            jitter = random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)  # noqa: S311  # no secret
            limits = replace(limits, max_age_s=limits.max_age_s * jitter)
        self._http = ServerConnection(
            Call,
            limits,
            time.monotonic(),
            unsent_total=server.unsent_total,
            request_total=server.request_total,
        )
        self._calls = Calls(server, self._http)
        server.connections.add(self)
        server.stats.open = len(server.connections)
        self._note_stall()

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, and answer what can be answered at once."""
        self._note_stall()
        if len(data) > self._at_once_bytes:
            self._server.backlog.put(self, data)
        else:
            self.take_input(data)

    def _note_stall(self) -> None:
        waited_s = self._server.stalls.waited_s()
        if waited_s:
            self._age.delayed_since(time.monotonic() - waited_s)

    def _note_hold(self, now_s: float) -> None:
        if now_s - self._held_since_s > _LONG_S:
            self._age.delayed_since(self._held_since_s)

    def hold_input(self, is_held: bool) -> None:  # noqa: FBT001  # the state itself
        """See Taker."""
        self._at_once_bytes = -1 if is_held else AT_ONCE_BYTES
        if is_held:
            self._held_since_s = time.monotonic()
        else:
            self._note_hold(time.monotonic())
            self._held_since_s = math.inf
        if self._transport.is_closing():
            return
        with suppress(NotImplementedError):  # asyncio allows a transport that cannot pause
            if is_held:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def take_input(self, data: bytes) -> None:
        """See Taker."""
        if self._closing_since_s is not None:
            # Discarded: see the top of this module.
            return
        if not self._is_http2:
            data = self._first + data
            if not self._begins_http2(data):
                return
        now_s = time.monotonic()
        self._note_hold(now_s)
        calls = self._http.receive(data, now_s)
        if self._age.since_s != math.inf or self._http.has_admission:
            self._note_age(calls, now_s)
        self._calls.take(calls, self, now_s)
        self._flush(now_s)

    def _note_age(self, calls: list[Call], now_s: float) -> None:
        """Tell new calls how long they may have waited before they were taken in."""
        if self._http.has_admission:
            self._age.delayed_since(now_s)
        for call in calls:
            # Not again with a later part of its body.
            call.waited_s = call.waited_s or max(0.0, call.arrived_s - self._age.since_s)
        if self._at_once_bytes < 0 or self._http.has_admission:
            # There is more of what waited.
            return
        if self._http.echoes > self._echoes:
            self._echoes = self._http.echoes
            self._age.echoed()
        if self._age.ask(now_s):
            self._http.ask_echo()

    def eof_received(self) -> bool:
        """Take note that the client sends no more; False closes the transport."""
        self._server.backlog.drain(self)
        has_tls = self._transport.get_extra_info("ssl_object") is not None
        if self._closing_since_s is not None or has_tls or not self._http.streams:
            return False
        # A client that has shut its side may still wait for answers.
        for call in self._http.end_input():
            cancel(call)
        self._flush()
        return bool(self._http.streams)

    def pause_writing(self) -> None:
        """Hold answers from now on."""
        self._is_writable = False
        self._http.answers.pause(time.monotonic())

    def resume_writing(self) -> None:
        """Go on sending."""
        self._is_writable = True
        self._http.answers.resume()
        self._flush(time.monotonic())

    def connection_lost(self, _exc: Exception | None) -> None:
        """Stop all work for the client."""
        server = self._server
        server.backlog.drop(self)
        server.connections.discard(self)
        server.stats.open = len(server.connections)
        server.stats.ended[self._http.reason or "client"] += 1
        self._calls.cancel_all()
        self._http.abandon()
        self._forget()
        self.closed.set()

    # What the engine calls.

    @property
    def unsent_bytes(self) -> int:
        """How many bytes of answers the client has not taken."""
        return self._http.answers.unsent_bytes

    @property
    def request_bytes(self) -> int:
        """How many bytes of requests are held that are not complete, or wait."""
        return self._http.requests.size_bytes

    def incomplete_since_s(self) -> float:
        """Return when the oldest of these requests arrived; infinity if there is none."""
        return self._http.requests.since_s(self._http.begun_s)

    def still_since_s(self) -> float:
        """Return since when the client has taken nothing of some answer; infinity if nothing waits."""
        return self._http.answers.still_since_s()

    def retire(self, reason: str) -> None:
        """Ask the client to open no more streams, and close when those that are open are answered."""
        # Also if nothing has come yet: the first request may be under way, and would be lost.
        now_s = time.monotonic()
        self._http.retire(reason, now_s)
        self._flush(now_s)

    def expel(self, reason: str) -> None:
        """Answer what is open with UNAVAILABLE, and close."""
        now_s = time.monotonic()
        self._calls.expel(reason)
        self._http.is_over = True
        self._flush(now_s)

    def check(self, now_s: float) -> None:
        """Keep the bounds of time."""
        if self._closing_since_s is not None:
            if now_s - self._closing_since_s > _LINGER_S:
                self._transport.abort()
            return
        if self._age.is_late(now_s):
            self.retire("ping_timeout")
        for call in self._http.check(now_s):
            cancel(call)
        if self._http.is_overdue(now_s):
            self.expel("mnemosyned: the connection is too old")
        elif self._is_http2 or self._http.reason:
            # A client that may still turn out to speak HTTP/1 gets no SETTINGS.
            self._flush(now_s)

    def abort(self, reason: str) -> None:
        """Close at once, whatever is unsent."""
        self._http.reason = reason
        self._calls.cancel_all()
        self._http.abandon()
        self._drop()

    def _drop(self) -> None:
        """Close the socket without what waits in the kernel for the client."""
        with suppress(OSError):
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER
            )
        self._transport.abort()

    # What a call asks for (Way).

    def send_part(self, call: Call, message: bytes) -> None:
        """See Way."""
        self._calls.send_part(call, message)
        self._flush()

    def count(self, call: Call, size_bytes: int) -> None:
        """See Way."""
        self._http.requests.count(call, size_bytes)

    def unsent_of(self, call: Call) -> int:
        """See Way."""
        return self._http.answers.unsent_of(call)

    def flush_soon(self) -> None:
        """See Way."""
        if not self._http.streams:
            # Nothing else will be answered.
            self._flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """See Way."""
        if self._certificate_names is None:
            tls = self._transport.get_extra_info("ssl_object")
            certificate = tls.getpeercert(binary_form=True) if tls is not None else None
            pem = ssl.DER_cert_to_PEM_cert(certificate) if certificate else ""
            self._certificate_names = names_of(pem) if pem else ()
        return self._certificate_names

    # Bytes.

    def _flush(self, now_s: float = 0.0) -> None:
        """Write what there is; a client that is behind with reading gets it in its turn."""
        self._flush_is_due = False
        if self._http.answers.has_held:
            self._server.backlog.put_sender(self)
        else:
            self._write(now_s or time.monotonic())

    def send_held(self) -> None:
        """See Taker."""
        self._write(time.monotonic())

    def _write(self, now_s: float) -> None:
        """Write one turn's worth, begin what has waited for that, and close if that was the last."""
        http = self._http
        has_more = True
        while has_more and not self._transport.is_closing():
            output, emptied = http.output(now_s)
            if output:
                self._transport.write(output)
            for call in emptied:
                if isinstance(call.work, Streaming):
                    call.work.wake()
            has_more = self._begin_waiting(now_s)
            if http.answers.has_held and (has_more or (output and self._is_writable)):
                self._server.backlog.put_sender(self)
                break
        if http.is_over:
            self._close()

    def _begin_waiting(self, now_s: float) -> bool:
        """Begin requests that have waited for others to be answered, or for answers to be read."""
        admitted = self._http.admit(now_s)
        if admitted:
            self._note_age(admitted, now_s)
        self._calls.take(admitted, self, now_s)
        waiting = self._http.answers.next_waiting()
        if waiting is not None:
            self._calls.begin(waiting, self, now_s)
        return bool(admitted) or waiting is not None

    def _close(self) -> None:
        if self._closing_since_s is not None or self._transport.is_closing():
            return
        self._closing_since_s = time.monotonic()
        self._calls.cancel_all()
        self._http.abandon()
        if self._is_writable and self._transport.can_write_eof() and not self._http.is_half_closed:
            self._transport.write_eof()
        elif self._is_writable:
            self._transport.close()
        else:
            # What is written would never leave.
            self._drop()

    def _begins_http2(self, data: bytes) -> bool:
        """Tell whether the client speaks HTTP/2; if it speaks something else, answer that and close."""
        if data.startswith(CLIENT_PREFACE):
            self._is_http2, self._first = True, b""
            return True
        if CLIENT_PREFACE.startswith(data):
            self._first = data
            return False
        answer = http1.answer_to(data)
        if answer:
            self._transport.write(answer)
        self._http.reason = "http1" if answer else "protocol"
        self._http.is_over = True
        self._close()
        return False
