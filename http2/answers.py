"""The answers of a server's connection: framed at once, or held until the peer can take them. Pure.

outbox.py holds what cannot be framed. An answer whose rest is held is ended there, and forgotten when `turn`
has framed the last of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping, Sequence
from typing import Generic, TypeVar

from http2.core import NO_ERROR, Core
from http2.outbox import Headers, Outbox, Tally
from http2.purse import Purse
from http2.request_bytes import RequestBytes
from http2.stream import Stream

S = TypeVar("S", bound=Stream)


class Answers(Generic[S]):
    """Answers streams, each of them once: whole, or with a head, parts and an end."""

    __slots__ = (
        "_core",
        "_max_unsent_bytes",
        "_outbox",
        "_paused_since_s",
        "_purse",
        "_requests",
        "_streams",
        "_waiting",
    )

    def __init__(
        self,
        core: Core,
        purse: Purse,
        streams: MutableMapping[int, S],
        requests: RequestBytes,
        *,
        unsent_total: Tally,
        max_unsent_bytes: int,
    ) -> None:
        """`streams` are those of the connection: one that is answered is removed from them."""
        self._core = core
        self._outbox = Outbox(core, unsent_total)
        self._paused_since_s: float | None = None
        self._purse = purse
        self._streams = streams
        self._requests = requests
        self._max_unsent_bytes = max_unsent_bytes
        self._waiting: deque[S] = deque()  # complete, and not begun because too much is unsent

    def may_begin(self, stream: S) -> bool:
        """Tell whether work on a complete request may begin; if not, `next_waiting` returns it later."""
        if self._outbox.unsent_bytes <= self._max_unsent_bytes:
            return True
        self._waiting.append(stream)
        return False

    def next_waiting(self) -> S | None:
        """Return a complete request that had to wait, if work on it may begin now."""
        while self._waiting and self._outbox.unsent_bytes <= self._max_unsent_bytes:
            stream = self._waiting.popleft()
            if not stream.is_reset:
                return stream
        return None

    def whole(self, stream: S, headers: Headers, body: bytes, trailers: Headers, now_s: float) -> None:
        """Answer a stream with status 200, of which nothing was answered before."""
        sender = self._core.stream(stream.id)
        sender.send_response(200, headers)
        self._purse.answers += 1
        if self._outbox.fits(sender, stream.id, len(body)):
            sender.send_data(body)
            sender.end_message(trailers)
            if stream.is_complete and not stream.counted_bytes:
                # Nothing is held of it, so this is all that there is to forget.
                del self._streams[stream.id]
            else:
                self._note_sent(stream)
        else:
            stream.is_answered = stream.is_ended = True
            self._outbox.hold(sender, stream.id, (body,), now_s)
            self._outbox.end(stream.id, trailers)

    def head(self, stream: S, status: int, headers: Headers, *, ends: bool = False) -> None:
        """Begin an answer; `ends`: that is all of it."""
        self._core.stream(stream.id).send_response(status, headers, ends)
        self._purse.answers += 1
        stream.is_answered = True
        if ends:
            self._note_sent(stream)

    def part(self, stream: S, pieces: Sequence[bytes], now_s: float) -> None:
        """Send a part of an answer's body, or hold it."""
        sender = self._core.stream(stream.id)
        self._purse.answers += 1
        if self._outbox.fits(sender, stream.id, sum(map(len, pieces))):
            for piece in pieces:
                sender.send_data(piece)
        else:
            self._outbox.hold(sender, stream.id, pieces, now_s)

    def end(self, stream: S, trailers: Headers | None) -> None:
        """End an answer, after what is held of it."""
        if self._outbox.end(stream.id, trailers):
            stream.is_ended = True
        else:
            self._core.stream(stream.id).end_message(trailers)
            self._note_sent(stream)

    def turn(self, now_s: float) -> list[S]:
        """Frame what is held, as much as may be sent now; return the streams of which all is framed.

        Those whose answers are ended are forgotten, and not returned.
        """
        emptied: list[S] = []
        if self._outbox:
            for stream_id in self._outbox.pump(now_s):
                stream = self._streams[stream_id]
                if stream.is_ended:
                    self._note_sent(stream)
                else:
                    emptied.append(stream)
        self._outbox.begin_turn()
        return emptied

    def pause(self, now_s: float) -> None:
        """Hold all answers from now on: the transport has enough."""
        self._paused_since_s = now_s
        self._outbox.pause(True)

    def resume(self) -> None:
        """Go on: the transport takes more."""
        self._paused_since_s = None
        self._outbox.pause(False)

    @property
    def has_held(self) -> bool:
        """Whether anything is held."""
        return bool(self._outbox)

    @property
    def unsent_bytes(self) -> int:
        """How many bytes are held."""
        return self._outbox.unsent_bytes

    @property
    def sent_bytes(self) -> int:
        """How many bytes were framed before this turn."""
        return self._outbox.sent_bytes

    def still_since_s(self) -> float:
        """Return since when the peer has taken nothing of some answer; infinity if nothing is held."""
        return self._outbox.still_since_s()

    def is_stuck_since(self, since_s: float) -> bool:
        """Tell whether the peer has taken nothing of all that is held since then."""
        is_paused = self._paused_since_s is not None and self._paused_since_s < since_s
        return is_paused or self._outbox.is_stuck_since(since_s)

    def stuck_since(self, since_s: float) -> list[S]:
        """Return the streams of whose answers the peer has taken nothing since then."""
        return [self._streams[stream_id] for stream_id in self._outbox.stuck_since(since_s)]

    def clear(self) -> None:
        """Hold nothing any more."""
        self._outbox.clear()

    def unsent_of(self, stream: S) -> int:
        """Return how many bytes of an answer are held."""
        return self._outbox.unsent_of(stream.id)

    def forget(self, stream: S) -> None:
        """Keep nothing of a stream any more, whatever is unsent of its answer."""
        self._requests.release(stream)
        del self._streams[stream.id]
        if self._outbox:
            self._outbox.drop(stream.id)

    def _note_sent(self, stream: S) -> None:
        """Take note that all of an answer is framed."""
        if not stream.is_complete:
            # The peer need not send the rest of its request (RFC 9113, section 8.1).
            self._core.stream(stream.id).reset(NO_ERROR)
        self.forget(stream)
