"""One peer as the owner of tokens: what waits for it, and whether it answers.

    calls ------> reads  -+                       CallQueue: what arrives while batches are under way forms
                  writes -+--> idle streams       the next batch
                  alone  -+                       each a batch of its own
    invalidations -> notices ----> peer           Batcher: the same, for what its caller awaits

- Reads and writes have separate queues. A batch is answered as a whole, and a read must not wait for the
  row lock of a write.
- A call that may take longer than TRY_S is alone: others would wait for it.
- The breaker knows whether the peer answers.
- Idle streams are open and have no batch under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from aio.batcher import Batcher, BatchLimits
from aio.later import Later
from cluster.breaker import Breaker
from cluster.call_queue import CallQueue, Line
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.forward_stream import ForwardStream
from cluster.peerpb import peer_pb2 as pb
from cluster.timing import STREAM_GRACE_S, TRY_S

# Some slices of what a connection sends (http2/outbox.py): a batch does not keep others waiting for long.
_BATCHES: Final = BatchLimits(
    max_items=128, max_bytes=256 * 1024, max_waiting=10_000, concurrency=2, is_eager=True
)
_ALONE: Final = BatchLimits(max_items=1, max_waiting=10_000, concurrency=64)


class Owner:
    """The state that this node keeps of one peer; it sends nothing itself."""

    def __init__(
        self,
        line: Line,
        notify: Callable[[Sequence[str]], Awaitable[Sequence[int]]],
    ) -> None:
        """`line` sends batches of calls, `notify` sends tokens whose copies must be dropped."""
        self.breaker = Breaker()
        # Longer than the stream, which runs until the item's own deadline: see STREAM_GRACE_S.
        self._reads = CallQueue(line, _BATCHES, grace_s=STREAM_GRACE_S)
        self._writes = CallQueue(line, _BATCHES, grace_s=STREAM_GRACE_S)
        self._alone = CallQueue(line, _ALONE, grace_s=STREAM_GRACE_S)
        self._notices = Batcher(notify, limits=_BATCHES, size_bytes=len, full=_queue_full)
        # (since when, stream), the last one used at the end; at most one for each batch that may be under
        # way.
        self._idle: list[tuple[float, ForwardStream]] = []

    def forward(self, item: pb.Item, *, is_write: bool, try_s: float) -> Later[pb.Answer]:
        """Return the peer's answer to one call, or the failure of the batch that the call was in.

        Raises:
            PeerSkipped: it is known not to answer, or too many calls wait for it.
        """
        if not self.breaker.is_closed:
            raise PeerSkipped("it does not answer")
        calls = self._writes if is_write else self._reads
        return (calls if try_s <= TRY_S else self._alone).add(item, try_s=try_s)

    async def notify(self, token: str, *, tell_s: float) -> int | ClusterError:
        """Have the peer drop its copy; return which process has, or the failure if none is known to have.

        Raises:
            PeerSkipped: too many tokens wait for the peer.
        """
        try:
            return await self._notices.submit(token, timeout_s=tell_s)
        except TimeoutError:
            return PeerTimeout("no answer in time")
        except PeerSkipped:
            # The peer has not seen the token, so this is no evidence against the peer.
            raise
        except ClusterError as exc:
            return exc
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # this is a coroutine
                raise
            # Not the caller was cancelled but the batch, by `close`: the peer has left the cluster.
            return PeerUnreachable("it is no member any more")

    def take_stream(self, address: str) -> ForwardStream | None:
        """Return an idle stream to this address, the last one used; None if there is none.

        Streams that the peer has closed, and streams to an address that the peer no longer has, are dropped.
        """
        while self._idle:
            _, stream = self._idle.pop()
            if stream.is_open and stream.address == address:
                return stream
        return None

    def give_back(self, stream: ForwardStream) -> None:
        """Keep a stream whose batch was answered for the next batch."""
        self._idle.append((time.monotonic(), stream))

    def end_idle(self, after_s: float) -> None:
        """End the streams that have been idle for that long."""
        before_s = time.monotonic() - after_s
        while self._idle and self._idle[0][0] <= before_s:
            _, stream = self._idle.pop(0)
            stream.end()

    async def close(self) -> None:
        """Cancel what waits and what is under way; `forward` and `notify` then return PeerUnreachable."""
        for calls in (self._reads, self._writes, self._alone):
            calls.close()
        await self._notices.close()
        self.end_idle(0.0)


def _queue_full() -> ClusterError:
    return PeerSkipped("too many calls wait for it")
