"""A client of the library `h2` and our ServerConnection, joined without a socket; the test has the clock."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.events
import h2.settings
from raw_http2 import request_headers

from http2.outbox import Headers, Tally
from http2.server import ServerConnection
from http2.stream import ServerLimits, Stream

OK: Headers = [(b"content-type", b"application/grpc")]
TRAILERS: Headers = [(b"grpc-status", b"0")]


class Server:
    """Answers each complete request by its path: /echo at once, /hold when the test says so."""

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.unsent, self.incomplete = Tally(), Tally()
        self.now_s = 100.0
        self.http: ServerConnection[Stream] = ServerConnection(
            Stream,
            limits or ServerLimits(),
            self.now_s,
            unsent_total=self.unsent,
            request_total=self.incomplete,
        )
        self.held: dict[int, Stream] = {}
        self.answered: list[int] = []
        self.was_reset: list[int] = []

    def receive(self, data: bytes) -> bytes:
        """Take bytes in, and return what is sent."""
        self._take(self.http.receive(data, self.now_s))
        return self.flush()

    def flush(self) -> bytes:
        sent = b""
        while True:
            output, _ = self.http.output(self.now_s)
            sent += output
            admitted = self.http.admit(self.now_s)
            self._take(admitted)
            waiting = self.http.answers.next_waiting()
            if waiting is not None:
                self._begin(waiting)
            if not (output or admitted or waiting):
                return sent

    def pass_time(self, seconds: float) -> bytes:
        """Check each second, as the engine does."""
        until_s = self.now_s + seconds
        sent = b""
        while self.now_s < until_s:
            self.now_s += 1.0
            self.was_reset += [stream.id for stream in self.http.check(self.now_s)]
            sent += self.flush()
        return sent

    def answer(self, stream: Stream, body: bytes = b"answer") -> None:
        self.answered.append(stream.id)
        self.held.pop(stream.id, None)
        self.http.answers.whole(stream, OK, body, TRAILERS, self.now_s)

    def _take(self, news: list[Stream]) -> None:
        for stream in news:
            if stream.is_reset:
                self.was_reset.append(stream.id)
                self.held.pop(stream.id, None)
            elif stream.is_refused and not stream.is_answered:
                self.http.answers.head(stream, 200, [(b"grpc-status", b"8")], ends=True)
            elif stream.is_complete and self.http.answers.may_begin(stream):
                self._begin(stream)

    def _begin(self, stream: Stream) -> None:
        if stream.target == b"/hold":
            self.held[stream.id] = stream
        else:
            size = int(stream.target[5:]) if stream.target.startswith(b"/big/") else None
            self.answer(stream, bytes(stream.body) if size is None else bytes(size))


class Joined:
    """A connection between an h2 client and a Server; bytes move when the test says so."""

    def __init__(self, limits: ServerLimits | None = None, *, window: int | None = None) -> None:
        self.server = Server(limits)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.events: list[h2.events.Event] = []

    def send(self, path: bytes = b"/echo", body: bytes | None = b"hello", *, ends: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, request_headers(path), end_stream=ends and body is None)
        if body is not None:
            self.h2.send_data(stream_id, body, end_stream=ends)
        return stream_id

    def exchange(self) -> None:
        """Move bytes both ways until nothing moves."""
        self.take(self.server.flush())
        while data := self.h2.data_to_send():
            self.take(self.server.receive(data))

    def take(self, data: bytes) -> None:
        if data:
            self.events += self.h2.receive_data(data)

    def ended(self) -> list[int]:
        return [it.stream_id for it in self.events if isinstance(it, h2.events.StreamEnded)]

    def reset(self) -> list[tuple[int, int]]:
        return [
            (it.stream_id, int(it.error_code)) for it in self.events if isinstance(it, h2.events.StreamReset)
        ]

    def goaways(self) -> list[tuple[int, int]]:
        return [
            (it.last_stream_id or 0, int(it.error_code))
            for it in self.events
            if isinstance(it, h2.events.ConnectionTerminated)
        ]
