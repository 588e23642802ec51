"""A call that a peer has forwarded, as its handler sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aio.deadline import Deadline

if TYPE_CHECKING:
    from cluster.peerpb import peer_pb2 as pb
    from mnemosyned.sessions.mirrors import Grant

# More than two nodes' estimates of the storage's clock differ by (sessions/clock.py). A larger value would be
# safe too, but it is taken from the time that a forwarded write has.
CLOCK_ERROR_US: Final = 50_000
_MS_PER_S: Final = 1000


class Arrival(NamedTuple):
    """When a batch of forwarded calls came, and from which node: the same for all of them."""

    storage_us: int  # on the storage's clock
    at_s: float  # on `time.monotonic()`
    peer: str


class ForwardedCall:
    """A client's call that another node has forwarded; `peer` is that node, for the log. A Call.

    - `certificate_names` is empty: if the client has a certificate, it has shown it to the entry node.
    - `is_retry` tells that an earlier try may have done the work.
    - `mirror_for` is the name of that node, if it wants to keep the session in the answer; otherwise empty.
    - `grant` is what it gets.
    """

    __slots__ = ("_arrived_s", "_deadline", "_item", "grant", "is_retry", "mirror_for", "peer")

    certificate_names: tuple[str, ...] = ()
    owner: str | None = None  # the entry node says it

    def __init__(self, item: pb.Item, arrival: Arrival, *, is_retry: bool) -> None:
        self._item = item
        _, self._arrived_s, self.peer = arrival
        self._deadline: Deadline | None = None  # once it was asked for, which a call that waits does twice
        self.is_retry = is_retry
        self.mirror_for = item.mirror_for
        self.grant: Grant | None = None

    @property
    def deadline(self) -> Deadline:
        """See Call. A call that the cache answers never asks."""
        if self._deadline is None:
            self._deadline = Deadline(
                self._arrived_s + self._item.timeout_ms / _MS_PER_S,
                not_after_us=self._item.deadline_us - CLOCK_ERROR_US,
            )
        return self._deadline

    def metadata(self, key: str) -> str | None:
        """See Call."""
        # Those that the item has fields for. Others, such as a token or an API key, do not travel further
        # than they must.
        if key not in {"request_id", "traceparent", "tracestate"}:
            return None
        return getattr(self._item, key) or None
