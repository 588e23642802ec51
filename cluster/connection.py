"""One connection to another node: does on a socket what `ClientConnection` (http2/client.py) decides.

    channel.py ─── opens requests, sends ───> Connection ──── bytes ───> socket
    responses.py, channel_stream.py <─ news ──┘ <────── bytes ────┘

- Requests that are sent in one step leave in one write. While the socket takes nothing, they wait in
  `ClientConnection`.
- What arrives is given to the work of its stream in the same step.
- A connection that retires opens no more streams, and closes after the last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, cast

from http2.client import ClientConnection, ClientStream, Work
from http2.outbox import Headers

_HIGH_WATER_BYTES: Final = 256 * 1024  # in the transport, before it asks for a pause


class Connection(asyncio.Protocol):
    """One connection: does what ClientConnection decides."""

    def __init__(self, room: asyncio.Event) -> None:
        self.introduction: Any = None  # what the channel's `introduce` returned
        self.http = ClientConnection()
        self.loop = asyncio.get_running_loop()
        self.lost = asyncio.Event()
        self.lost_to: Callable[[Connection], None] = lambda _: None
        self._room = room
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # before anything else
        self._is_writable = True

    @property
    def host(self) -> str:
        """The address that was dialled."""
        return str(self._transport.get_extra_info("peername", ("",))[0])

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """The names in the server's certificate, which was verified; empty without TLS."""
        tls = self._transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert()
        names = certificate.get("subjectAltName", ()) if certificate else ()
        return tuple(value for kind, value in names if kind in {"DNS", "IP Address"})

    def open(self, path: bytes, headers: Headers, work: Work) -> ClientStream:
        """Begin a request; `send` sends it."""
        return self.http.open(path, headers, work)

    def send(self, stream: ClientStream, part: bytes, *, is_last: bool) -> None:
        """Send a part of a request."""
        self.http.send(stream, part, time.monotonic())
        if is_last:
            self.http.finish(stream)
        self._flush()

    def finish(self, stream: ClientStream) -> None:
        """End a request."""
        self.http.finish(stream)
        self._flush()

    def cancel(self, stream: ClientStream) -> None:
        """Reset a stream, if it is open."""
        if stream.id in self.http.streams:
            self.http.cancel(stream)
            self._flush()
            self._close_if_done()

    def retire(self) -> None:
        """Open no more streams, and close after the last."""
        self.http.is_retiring = True
        self._close_if_done()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Give the news of each stream to who waits for it."""
        for stream in self.http.receive(data):
            stream.work.take_news(stream)
        self._room.set()
        self._flush()
        self._close_if_done()

    def pause_writing(self) -> None:
        """Hold requests from now on."""
        self._is_writable = False
        self.http.pause(is_paused=True)

    def resume_writing(self) -> None:
        """Go on sending."""
        self._is_writable = True
        self.http.pause(is_paused=False)
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Tell all who wait that nothing comes."""
        for stream in self.http.lose():
            stream.work.take_news(stream)
        self.lost.set()
        self._room.set()
        self.lost_to(self)

    def _flush(self) -> None:
        while not self._transport.is_closing():
            output = self.http.output(time.monotonic())
            if not output:
                break
            self._transport.write(output)
            if not self.http.unsent_bytes or not self._is_writable:
                break

    def _close_if_done(self) -> None:
        if self.http.is_over or (self.http.is_retiring and not self.http.streams):
            self._transport.close()
