"""A stream to one peer, on which each batch of forwarded calls is answered before the next is sent.

    ask(batch) ── sealed ──> ChannelStream ──> peer       the first batch opens the stream, which is signed
        <─── answers, whose seal is checked ──── peer

A stream costs half of what one call for each batch costs: its headers and its signature are sent once. Each
message has a seal instead, which holds in this place of this stream alone (`StreamMac` in peer_auth.py).

The messages have no numbers, so a stream whose answer was not read cannot be used again: it would give one
batch the answers of another. `ask` closes it after any failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aio.later import Later, Outcome, begun
from aio.tasks import Tasks
from cluster.channel import Channel
from cluster.channel_stream import ChannelStream
from cluster.errors import ClusterError
from cluster.peer_auth import PeerKey, StreamMac
from cluster.peerpb import peer_pb2 as pb
from cluster.signing import metadata, path, sign
from cluster.wire import parsed
from http2.outbox import Headers


class ForwardStream:
    """A stream to one peer."""

    def __init__(
        self,
        address: str,
        channel: Channel,
        *,
        is_current: Callable[[], bool],
        count: Callable[[], Callable[[Outcome[bytes]], Outcome[bytes]]],
        tasks: Tasks,
    ) -> None:
        """`is_current` tells whether the stream's connection is still in use, and not about to be closed.

        `count` counts a batch in, and returns what counts it out; `tasks` open the stream.
        """
        self.address = address
        self._stream = ChannelStream(channel, path("Forward"), self._open)
        self._batches, self._answers = StreamMac(None), StreamMac(None)
        self._is_current = is_current
        self._count = count
        self._tasks = tasks

    @property
    def is_open(self) -> bool:
        """Whether the peer, as far as is known, waits for a batch."""
        return self._stream.is_open and self._is_current()

    def ask(self, batch: bytes, *, timeout_s: float) -> Later[bytes]:
        """Return the peer's answers to a serialized Batch; after a failure the stream is closed.

        The Later fails with:
            PeerUnreachable: no connection, or it broke, or the peer ended the stream.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
            PeerUnproven: what answers there is not proved to be a node of this cluster.
        """
        counted_out = self._count()
        if self._stream.is_begun:
            answer = self._ask(batch, timeout_s)
        else:
            answer = begun(self._open_and_ask(batch, timeout_s), self._tasks)
        return answer.through(counted_out)

    def _ask(self, batch: bytes, timeout_s: float) -> Later[bytes]:
        request = pb.ForwardRequest(batch=batch, seal=self._batches.seal(batch)).SerializeToString()
        return self._stream.ask(request, timeout_s=timeout_s).through(self._checked)

    async def _open_and_ask(self, batch: bytes, timeout_s: float) -> bytes:
        until_s = time.monotonic() + timeout_s
        await self._stream.open(timeout_s=timeout_s)
        return await self._ask(batch, until_s - time.monotonic())

    def _checked(self, response: Outcome[bytes]) -> Outcome[bytes]:
        if not isinstance(response, bytes):
            return response
        try:
            sealed = parsed(pb.ForwardResponse, response)
            self._answers.check(sealed.seal, sealed.answers)
        except ClusterError:
            self._stream.cancel()
            raise
        return sealed.answers

    def _open(self, key: PeerKey) -> Headers:
        # An empty body, since no batch is there yet.
        opening = sign(key, "Forward", b"")
        self._batches, self._answers = key.stream_macs(opening)
        return metadata(opening)

    def end(self) -> None:
        """Close the stream; no batch is under way on it."""
        self._stream.finish()
