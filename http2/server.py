"""The decisions of a server about one connection: streams, limits, time-outs, and how it ends. Pure.

The protocol class (mnemosyned/transport/h2_connection.py) passes in what has arrived and what time it is,
does what it is told, and sends `output()`. Everything that can be decided wrongly is decided here, and in the
parts of a connection: answers.py, request_bytes.py, outbox.py, admission.py and purse.py.

A stream
--------
    HEADERS ──> open ── DATA … ──> complete ── the caller answers ──> answered ── all is framed ──> forgotten
                  |                   |                                   |
                  └───────────────────┴── RST_STREAM, or a bound ─────────┴──> `is_reset`, forgotten

`receive` returns the streams that have news: new, complete, with a part of a body, or reset. A stream that is
complete is answered once; one whose method streams is answered in parts.

The connection
--------------
    OPEN ── retire() ──> RETIRING ── PING answered, or too late ──> CLOSING ── no stream is left ──> is_over
      |                      |                                         |
      └──────────────────────┴── a bound is passed, or the peer errs ──┴──────> is_over

- RETIRING: a GOAWAY with the highest possible stream has been sent. It asks the peer to open no more streams,
  and still accepts those that are under way (RFC 9113, section 6.8). The PING behind it is answered after the
  peer has seen the GOAWAY.
- CLOSING: a second GOAWAY names the last stream that was accepted. Later ones are refused with
  REFUSED_STREAM, which says that nothing was done, so that the peer may repeat them elsewhere.
- A connection is worn out at CLOSE_AFTER_STREAMS: it is CLOSING at once, and later streams are not even
  refused, because the library would count them. The GOAWAY has told the peer that they were not begun.
- A peer that has shut its side gets its answers; then the connection is over, in any phase.
- Reasons to retire: a drain, the connection's age, and RETIRE_AFTER_STREAMS (core.py).

The bounds
----------
    what is bounded                           | beyond it
    ------------------------------------------+----------------------------------------------------------
    streams at once                           | further ones wait (admission.py)
    bytes of requests that are not complete   | the stream is `is_refused`, and its bytes are dropped
    bytes of one block of headers             | ENHANCE_YOUR_CALM, by the library
    held bytes of answers                     | complete streams wait (answers.py) until the peer reads
    frames without use (purse.py)             | ENHANCE_YOUR_CALM
    time until the preface, or a frame's end  | the connection ends
    time without a part of an open request    | CANCEL for the stream
    time in which the peer takes no answer    | CANCEL for the stream, or the end of the connection
    time without a stream                     | retire

Rules for editing:

- `receive`, `Answers.whole` and `output` run for each call. Measure a change of them (tests/bench/echo.py).
- The library must never see a RST_STREAM for an open stream: `cancel` in core.py says why.
- No clock, no loop, no log.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final, Generic, TypeVar

from http2.admission import Admission, AdmissionFull
from http2.answers import Answers
from http2.core import (
    CANCEL,
    CLOSE_AFTER_STREAMS,
    ENHANCE_YOUR_CALM,
    FRAME_SIZE_ERROR,
    NEED_DATA,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RETIRE_AFTER_STREAMS,
    Data,
    EndOfMessage,
    Ping,
    ProtocolViolated,
    Request,
    RstStream,
    Settings,
    cancel,
    server_core,
)
from http2.frames import CLIENT_PREFACE, RST_STREAM_BYTES, FrameScanner, MalformedFrame, reset_at
from http2.outbox import Tally
from http2.purse import Purse
from http2.request_bytes import RequestBytes
from http2.stream import ServerLimits, Stream

_HIGHEST_STREAM: Final = 2**31 - 1

_GOODBYE: Final = b"goodbye!"
_ECHO: Final = b"so far.."
_PING: Final = b"\0\0\x08\x06\0\0\0\0\0"
_PING_FRAME: Final = _PING + _GOODBYE
_GOODBYE_S: Final = 1.0  # for the answer to this PING


class Phase(Enum):
    """How a connection stands; see the top of this module."""

    OPEN = "open"
    RETIRING = "retiring"
    CLOSING = "closing"


S = TypeVar("S", bound=Stream)


class ServerConnection(Generic[S]):
    """One connection, from its first byte to its last."""

    __slots__ = (
        "_admission",
        "_chunk",
        "_core",
        "_highest_id",
        "_is_worn_out",
        "_last_id",
        "_limits",
        "_may_refuse",
        "_opened",
        "_output",
        "_phase",
        "_phase_s",
        "_purse",
        "_scanner",
        "_stream_type",
        "answers",
        "begun_s",
        "echoes",
        "has_preface",
        "is_half_closed",
        "is_over",
        "moved_s",
        "reason",
        "requests",
        "streams",
    )

    def __init__(
        self,
        stream_type: Callable[[Request, float], S],
        limits: ServerLimits,
        now_s: float,
        *,
        unsent_total: Tally,
        request_total: Tally,
    ) -> None:
        """The totals count bytes over all connections; bounds on them are the caller's to keep."""
        self._core, self._output = server_core(
            max_streams=limits.max_streams, max_header_bytes=limits.max_header_bytes
        )
        self._limits = limits
        self._scanner = FrameScanner(preface_bytes=len(CLIENT_PREFACE))
        self._stream_type = stream_type
        self._admission = Admission()
        self._chunk = 0
        self._may_refuse = False  # there may be a reason to refuse a new stream
        self._opened = 0
        self._highest_id = 0  # of any stream that the peer has opened
        self._last_id = 0  # of those that were accepted
        self._purse = Purse(now_s)
        self._phase = Phase.OPEN
        self._is_worn_out = False
        self._phase_s = now_s
        self.streams: dict[int, S] = {}  # accepted, and not forgotten
        self.requests = RequestBytes(self.streams, request_total, max_body_bytes=limits.max_request_bytes)
        self.answers = Answers(
            self._core,
            self._purse,
            self.streams,
            self.requests,
            unsent_total=unsent_total,
            max_unsent_bytes=limits.max_unsent_bytes,
        )
        self.has_preface = False
        self.is_half_closed = False  # the peer sends no more
        self.is_over = False  # send the last output, then close
        self.echoes = 0  # answers to `ask_echo`
        self.reason = ""  # why it is over or retires: one word, for a metric
        self.begun_s = now_s
        self.moved_s = now_s  # when something last arrived

    # What arrives.

    def receive(self, chunk: bytes, now_s: float) -> list[S]:  # noqa: C901  # four ways to err
        """Take bytes in; return the streams that have news, each once.

        When the peer errs, the connection is over, and the GOAWAY that says why is in the output.
        """
        news: list[S] = []
        if self.is_over:
            return news
        self.moved_s = now_s
        self._chunk += 1
        scanner = self._scanner
        try:
            part = scanner.scan(chunk, now_s)
            if (
                scanner.resets
                or self._admission
                or self._is_worn_out
                or len(self.streams) + scanner.requests > self._limits.max_streams
            ):
                part = self._cut(part, news, now_s)
                self.requests.count_admission(self._admission.size_bytes)
            if part:
                self._core.receive_data(part)
                self._take_events(news, now_s)
        except MalformedFrame as exc:
            self._fail("protocol", FRAME_SIZE_ERROR if exc.is_too_large else PROTOCOL_ERROR)
        except AdmissionFull:
            self._fail("flood", ENHANCE_YOUR_CALM)
        except ProtocolViolated:
            # The library has written the GOAWAY.
            self._fail("protocol", None)
        if scanner.overhead:
            frames, scanner.overhead = scanner.overhead, 0
            if not self._purse.pay(frames, now_s, sent_bytes=self.answers.sent_bytes):
                self._fail("flood", ENHANCE_YOUR_CALM)
        if self._opened > RETIRE_AFTER_STREAMS:
            if self._phase is Phase.OPEN:
                self.retire("streams", now_s)
            if not scanner.block_is_open:
                self._wear_out(now_s)
        return news

    def admit(self, now_s: float) -> list[S]:
        """Open streams that wait for others to be answered, and return their news, as `receive` does."""
        news: list[S] = []
        room = self._limits.max_streams - len(self.streams)
        if self._admission and room > 0 and not self.is_over:
            self._chunk += 1
            try:
                self._core.receive_data(self._admission.next(room))
                self._take_events(news, now_s)
                self._wear_out(now_s)
            except ProtocolViolated:
                self._fail("protocol", None)
            self.requests.count_admission(self._admission.size_bytes)
        return news

    def end_input(self) -> list[S]:
        """Take note that the peer sends no more; return the streams that were reset for it.

        Their requests can never become complete. The others are answered, then the connection is over.
        """
        self.is_half_closed = True
        incomplete = [stream for stream in self.streams.values() if not stream.is_complete]
        for stream in incomplete:
            self.cancel(stream)
        return incomplete

    def _cut(self, part: bytes, news: list[S], now_s: float) -> bytes:
        """Take each RST_STREAM, and what comes before it; return what the library may have of the rest."""
        begin, first_at = 0, self._scanner.began_at
        for at in self._scanner.resets:
            passed = self._admitted(part[begin:at], first_at)
            if passed:
                self._core.receive_data(passed)
                self._take_events(news, now_s)
                self._wear_out(now_s)
            begin, first_at = at, 0
            if self._take_reset(reset_at(part, at), news):
                begin += RST_STREAM_BYTES
        return self._admitted(part[begin:], first_at)

    def _admitted(self, part: bytes, at: int) -> bytes:
        before, frames = self._scanner.cut(part, at)
        if self._is_worn_out:
            return before + b"".join(frame.data for frame in frames if frame.stream_id <= self._highest_id)
        room = self._limits.max_streams - len(self.streams) - self._scanner.begun_requests
        return before + self._admission.pass_on(frames, room=room, highest_id=self._highest_id)

    def _take_reset(self, stream_id: int, news: list[S]) -> bool:
        """Take a RST_STREAM; False: its stream was never opened, so the library shall refuse it."""
        if stream_id in self._admission:
            self._admission.reset_ids.add(stream_id)
            self._may_refuse = True
        elif stream_id > self._highest_id or not stream_id & 1:
            return self._is_worn_out
        elif stream_id in self.streams:
            self._output += cancel(self._core, stream_id, CANCEL)
            self._reset(stream_id, news)
        return True

    # One loop without calls, because it runs three times for each call of a client.
    def _take_events(self, news: list[S], now_s: float) -> None:  # noqa: C901, PLR0912, PLR0915
        next_event, streams, chunk = self._core.next_event, self.streams, self._chunk
        while True:
            event = next_event()
            if isinstance(event, Data):
                stream = streams.get(event.stream_id)
                if stream is None:
                    # It is answered, refused or reset.
                    continue
                if stream.body or stream.is_refused:
                    self.requests.append(stream, event.data)
                else:
                    stream.body = event.data
                if stream.chunk != chunk:
                    stream.chunk, stream.moved_s = chunk, now_s
                    news.append(stream)
            elif isinstance(event, EndOfMessage):
                stream = streams.get(event.stream_id)
                if stream is not None:
                    stream.is_complete = True
                    if stream.chunk != chunk:
                        stream.chunk = chunk
                        news.append(stream)
            elif isinstance(event, Request):
                self._opened += 1
                stream = self._stream_type(event, now_s)
                self._highest_id = stream.id
                if self._may_refuse and self._is_refused(stream):
                    continue
                self._last_id = stream.id
                streams[stream.id] = stream
                stream.chunk = chunk
                news.append(stream)
            elif event is NEED_DATA:
                return
            else:
                self._take_rare(event, news, now_s)

    def _is_refused(self, stream: S) -> bool:
        if self._admission.reset_ids and stream.id in self._admission.reset_ids:
            self._output += cancel(self._core, stream.id, CANCEL)
            return True
        if self._phase is Phase.CLOSING:
            self._core.stream(stream.id).reset(REFUSED_STREAM)
            return True
        return False

    def _take_rare(self, event: object, news: list[S], now_s: float) -> None:
        if isinstance(event, Settings):
            self.has_preface = True
        elif isinstance(event, RstStream):
            # By the library, which found the stream at fault. It counts the stream, too.
            if event.stream_id > self._highest_id:
                self._opened += 1
                self._highest_id = event.stream_id
            self._reset(event.stream_id, news)
        elif isinstance(event, Ping) and event.ack:
            self._take_echo(event.data, now_s)

    def _take_echo(self, data: bytes, now_s: float) -> None:
        if data == _ECHO:
            self.echoes += 1
        elif data == _GOODBYE and self._phase is Phase.RETIRING:
            self._close(now_s)

    def _reset(self, stream_id: int, news: list[S]) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            self.answers.forget(stream)
            stream.is_reset = True
            if stream.chunk != self._chunk:
                stream.chunk = self._chunk
                news.append(stream)

    def cancel(self, stream: S, code: int = CANCEL) -> None:
        """End a stream without an answer, or in the middle of it."""
        if stream.id in self.streams:
            self._core.stream(stream.id).reset(code)
            self.answers.forget(stream)
            stream.is_reset = True

    # What is sent.

    def output(self, now_s: float) -> tuple[bytes, list[S]]:
        """Return what to send now, and the streams of which with it all parts are framed.

        While it returns bytes and the transport takes them, there may be more.
        """
        emptied = self.answers.turn(now_s)
        data = self._core.data_to_send()
        if self._output:
            data, self._output = self._output + data, b""
        if not self.streams and (
            self._phase is Phase.CLOSING or (self.is_half_closed and not self._admission)
        ):
            self.is_over = True
        return data, emptied

    def ask_echo(self) -> None:
        """Send a PING; `echoes` counts its answer, which comes behind all that was sent before it."""
        self._output += self._core.data_to_send() + _PING + _ECHO

    @property
    def has_admission(self) -> bool:
        """Whether requests wait until others are answered, to be opened by `admit`."""
        return bool(self._admission)

    # How it ends.

    def retire(self, reason: str, now_s: float) -> None:
        """Ask the peer to open no more streams; those that are open go on."""
        if self._phase is Phase.OPEN and not self.is_over:
            self.reason = reason
            self._phase, self._phase_s = Phase.RETIRING, now_s
            self._core.close(NO_ERROR, _HIGHEST_STREAM)
            self._output += self._core.data_to_send() + _PING_FRAME

    def check(self, now_s: float) -> list[S]:
        """Keep the bounds of time, once a second; return the streams that were reset for them."""
        if self.is_over:
            return []
        late = self._too_late(now_s)
        if late is not None:
            self._fail(*late)
            return []
        self._check_age(now_s)
        if self.is_half_closed:
            # A peer that is gone looks like one that still reads, until something is sent to it.
            self._output += _PING_FRAME
        return self._reset_late(now_s)

    def _too_late(self, now_s: float) -> tuple[str, int] | None:
        """Return the reason and the code if the connection ends for what did not come in time."""
        limits = self._limits
        partial_since_s = self._scanner.partial_since_s
        if not self.has_preface and now_s - self.begun_s > limits.preface_s:
            return "preface_timeout", PROTOCOL_ERROR
        if partial_since_s is not None and now_s - partial_since_s > limits.frame_s:
            return "frame_timeout", PROTOCOL_ERROR
        if self.answers.is_stuck_since(now_s - limits.send_s):
            return "send_timeout", CANCEL
        return None

    def _check_age(self, now_s: float) -> None:
        limits = self._limits
        if self._phase is Phase.RETIRING and now_s - self._phase_s > _GOODBYE_S:
            self._close(now_s)
        elif now_s - self.begun_s > limits.max_age_s:
            self.retire("age", now_s)
        elif not self.streams and now_s - self.moved_s > limits.idle_s:
            self.retire("idle", now_s)

    def is_overdue(self, now_s: float) -> bool:
        """Tell whether streams are still open long after the connection became too old."""
        return (
            self.reason == "age"
            and self._phase is Phase.CLOSING
            and now_s - self._phase_s > self._limits.grace_s
        )

    def _reset_late(self, now_s: float) -> list[S]:
        limits = self._limits
        late = self.answers.stuck_since(now_s - limits.send_s)
        late += [
            stream
            for stream in self.streams.values()
            if not (stream.is_complete or stream.is_answered) and now_s - stream.moved_s > limits.body_s
        ]
        for stream in late:
            self.cancel(stream)
        return late

    def _close(self, now_s: float) -> None:
        """Accept no further stream, and say which was the last."""
        self._phase, self._phase_s = Phase.CLOSING, now_s
        self._may_refuse = True
        self._core.close(NO_ERROR, self._last_id)

    def _wear_out(self, now_s: float) -> None:
        if self._opened < CLOSE_AFTER_STREAMS or self._is_worn_out:
            return
        self._is_worn_out = True
        self.reason = self.reason or "streams"
        self._admission = Admission()
        if self._phase is not Phase.CLOSING and not self.is_over:
            self._close(now_s)

    def _fail(self, reason: str, code: int | None) -> None:
        """End the connection; None: the library has written the GOAWAY."""
        if not self.is_over:
            self.is_over = True
            self.reason = reason
            if code is not None:
                self._core.close(code, self._last_id)

    def abandon(self) -> None:
        """Forget all that is held: the connection is gone."""
        self.is_over = True
        self.answers.clear()
        self._admission = Admission()
        self.requests.count_admission(self._admission.size_bytes)
        for stream in list(self.streams.values()):
            self.answers.forget(stream)
            stream.is_reset = True
