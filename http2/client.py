"""The decisions of a client about one connection. Pure.

The protocol class (cluster/connection.py) passes in what has arrived, opens streams, and sends `output()`.

A stream
--------
    open() ── send() … ── finish() ──> the answer comes: `status`, `body` in parts, `trailers`
                                           |
                                           └── complete, or `reset_code`: the server has ended it

`receive` returns the streams that have news, each once. A stream that is complete or reset is forgotten.

The connection
--------------
- It takes new streams while `may_open`: the server has not sent GOAWAY, and the streams that it accepts at
  once are not used up. Before its SETTINGS have come, a hundred are taken to be accepted.
- A GOAWAY names the last stream that the server has accepted. Later ones were not begun: they end with
  REFUSED_STREAM, and may be repeated elsewhere. The others go on.
- It is over when the server errs, or when the transport is gone. All streams are then lost.

A client may end a stream at any time with `cancel`; what comes for it later is dropped.
"""

from __future__ import annotations

from typing import Final, Protocol

from http2.core import (
    CANCEL,
    NEED_DATA,
    NO_ERROR,
    REFUSED_STREAM,
    Data,
    EndOfMessage,
    GoAway,
    ProtocolViolated,
    Response,
    RstStream,
    Sender,
    Settings,
    client_core,
)
from http2.outbox import Headers, Outbox, Tally

_MAX_CONCURRENT_STREAMS: Final = 3
_OF_STREAMS: Final = (Data, Response, EndOfMessage, RstStream)
_UNKNOWN_MAX_STREAMS: Final = 100  # RFC 9113, section 6.5.2, recommends that servers accept as many


class Work(Protocol):
    """Who waits for an answer."""

    def take_news(self, stream: ClientStream) -> None:
        """Take note of what has come for a stream."""
        ...


class ClientStream:
    """One request and its answer."""

    __slots__ = (
        "body",
        "chunk",
        "headers",
        "id",
        "is_complete",
        "is_finished",
        "reset_code",
        "sender",
        "status",
        "trailers",
        "work",
    )

    def __init__(self, sender: Sender, work: Work) -> None:
        self.sender = sender  # for ClientConnection, as is `chunk`: the chunk that last brought news
        self.chunk = 0
        self.id = sender.stream_id
        self.is_finished = False  # the request is complete, but may be held
        self.status = 0  # of HTTP; 0: no answer has begun
        self.headers: Headers = []
        self.body: bytes | bytearray = b""  # what has arrived of it, and was not taken
        self.trailers: Headers = []
        self.is_complete = False
        self.reset_code: int | None = None  # the server, or the end of the connection, has ended it
        self.work = work

    def take_body(self) -> bytes | bytearray:
        """Return what has arrived of the body since it was last taken."""
        body, self.body = self.body, b""
        return body


class ClientConnection:
    """One connection to a server."""

    __slots__ = ("_chunk", "_core", "_max_streams", "_outbox", "is_over", "is_retiring", "streams")

    def __init__(self) -> None:
        self._core = client_core()
        self._outbox = Outbox(self._core, Tally())
        self._chunk = 0
        self._max_streams = _UNKNOWN_MAX_STREAMS
        self.streams: dict[int, ClientStream] = {}  # open
        self.is_retiring = False  # the server takes no new streams
        self.is_over = False

    @property
    def may_open(self) -> bool:
        """Whether a stream can be opened now."""
        return len(self.streams) < self._max_streams and not (self.is_retiring or self.is_over)

    @property
    def unsent_bytes(self) -> int:
        """How many bytes of requests the server has not taken."""
        return self._outbox.unsent_bytes

    def open(self, path: bytes, headers: Headers, work: Work) -> ClientStream:
        """Begin a request; only if it `may_open`."""
        stream = ClientStream(self._core.send_request(b"POST", path, b"2", headers), work)
        self.streams[stream.id] = stream
        return stream

    def send(self, stream: ClientStream, part: bytes, now_s: float) -> None:
        """Send a part of a request's body, or hold it."""
        if self._outbox.fits(stream.sender, stream.id, len(part)):
            stream.sender.send_data(part)
        else:
            self._outbox.hold(stream.sender, stream.id, (part,), now_s)

    def finish(self, stream: ClientStream) -> None:
        """End a request, after what is held of it."""
        if stream.id in self.streams and not stream.is_finished:
            stream.is_finished = True
            if not self._outbox.end(stream.id, None):
                stream.sender.end_message()

    def cancel(self, stream: ClientStream) -> None:
        """End a stream, whatever has come of its answer."""
        if self.streams.pop(stream.id, None) is not None:
            self._outbox.drop(stream.id)
            if not self.is_over:
                stream.sender.reset(CANCEL)

    def receive(self, chunk: bytes) -> list[ClientStream]:
        """Take bytes in; return the streams that have news, each once. If the server errs, it is over."""
        news: list[ClientStream] = []
        if self.is_over:
            return news
        self._chunk += 1
        try:
            self._core.receive_data(chunk)
            self._take_events(news)
        except ProtocolViolated:
            news += self.lose()
        return news

    def lose(self) -> list[ClientStream]:
        """Take note that the connection is gone; return the streams that are lost with it."""
        self.is_over = True
        lost = list(self.streams.values())
        for stream in lost:
            stream.reset_code = CANCEL
        self.streams.clear()
        self._outbox.clear()
        return lost

    def output(self, now_s: float) -> bytes:
        """Return what to send now; while the transport takes it, there may be more."""
        if self._outbox:
            self._outbox.pump(now_s)
        self._outbox.begin_turn()
        return self._core.data_to_send()

    def pause(self, *, is_paused: bool) -> None:
        """Hold all bodies from now on, or go on: as the transport wants."""
        self._outbox.pause(is_paused)

    def _take_events(self, news: list[ClientStream]) -> None:
        next_event = self._core.next_event
        while True:
            event = next_event()
            # Before the others: a stream of many messages has hardly anything else.
            if event is NEED_DATA:
                return
            if isinstance(event, _OF_STREAMS):
                stream = self.streams.get(event.stream_id)
                if stream is None:
                    continue
                self._take(stream, event)
                if stream.chunk != self._chunk:
                    stream.chunk = self._chunk
                    news.append(stream)
            elif isinstance(event, Settings):
                self._max_streams = dict(event.params).get(_MAX_CONCURRENT_STREAMS, self._max_streams)
            elif isinstance(event, GoAway):
                self._take_goaway(event, news)

    def _take(self, stream: ClientStream, event: Data | Response | EndOfMessage | RstStream) -> None:
        if isinstance(event, Data):
            if stream.body:
                stream.body = bytearray(stream.body) if isinstance(stream.body, bytes) else stream.body
                stream.body += event.data
            else:
                stream.body = event.data
        elif isinstance(event, Response):
            stream.status, stream.headers = event.status_code, list(event.headers)
        else:
            if isinstance(event, EndOfMessage):
                stream.trailers, stream.is_complete = event.trailers, True
                if not stream.is_finished:
                    stream.sender.reset(NO_ERROR)
            else:
                stream.reset_code = event.error_code
            del self.streams[stream.id]
            self._outbox.drop(stream.id)

    def _take_goaway(self, event: GoAway, news: list[ClientStream]) -> None:
        self.is_retiring = True
        for stream in list(self.streams.values()):
            if stream.id > event.last_stream_id:
                stream.reset_code = REFUSED_STREAM
                del self.streams[stream.id]
                self._outbox.drop(stream.id)
                if stream.chunk != self._chunk:
                    stream.chunk = self._chunk
                    news.append(stream)
