"""The Peer service: what other nodes of the cluster may ask of this node.

    method      | asked by                        | effect here
    ------------+---------------------------------+--------------------------------------------------
    Gossip      | cluster/gossip.py of a peer     | the membership protocol takes one packet
    Forward     | cluster/forward.py of a peer    | calls of clients, for tokens that this node owns
    Invalidate  | cluster/forward.py of a peer    | the copies of the named tokens are dropped
    Leave       | `mnemosyned cluster leave`      | this node drains and ends, as on SIGTERM

The service is on the same port as the SessionManager, so every client can reach it. Two checks stand before
each method:

- The guard: the caller is a node of this cluster (cluster/peer_auth.py). It has signed the call with the
  cluster's secret, or has shown a node's certificate.
- The origin: the caller's cluster and storage are those of this node, and the message is for this node.
  A signature does not show that, because a repeated message keeps its signature. Gossip checks the origin
  itself, so that a refusal reaches the other node as an answer.

Forwarded calls
---------------
Peers send calls in batches over a stream. A stream costs half of what one call for each batch costs.

    entry node                           this node (the owner)
       |-- metadata: opening signature ----->|  _checked, once for the stream
       |-- batch 1, seal 1 ----------------->|  the seal covers the number and the opening
       |                                     |  forwarded_batch.py: its items become calls
       |<-- answers 1, one for each item ----|
       |-- batch 2, seal 2 ----------------->|
       |                    ...              |
       |<-- trailers: OK --------------------|  between two batches: `close`

One batch is under way on a stream at a time. An error of the batch (a wrong seal, a wrong origin, bytes that
are no message) ends the stream.

What the entry node has already done for an item, and this node therefore does not do:

- It has asked for the API key or the certificate of the client (api/auth.py).
- It has chosen the token of a Start, so that a repeated Start is the same call.

`close` ends each stream once no batch is under way on it. A batch is never cut off, because the entry node
would then not know whether its writes were done. A new certificate ends no stream: connections that are open
keep the one that they began with, and the peer that has the new one dials with it (cluster/peers.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from aio.later import Later
from cluster.errors import MalformedPacket, UnauthenticatedPeer
from cluster.gossip import Gossip
from cluster.peer_auth import HELLO, METADATA_KEY, PeerAuth, PeerKey
from cluster.peerpb import peer_pb2 as pb
from cluster.signing import SERVICE_NAME
from cluster.wire import max_request_bytes
from mnemosyned.api.forwarded_batch import ForwardedBatches
from mnemosyned.api.parsing import parsed
from mnemosyned.errors import MalformedMessage, NotOurCluster, Unauthenticated
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable, UnaryHandler

log = logging.getLogger(__name__)

METHODS: Final = (HELLO, "Gossip", "Forward", "Invalidate", "Leave")
# What a proxy adds. Behind a proxy on this node's own host every caller seems to be on this host.
_PROXY_KEYS: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
# A table of many thousand members fits. A batch may also be one request of the largest size that a client may
# send, plus the fields of its item; `add_to` takes the larger of the two.
_MAX_MESSAGE_BYTES: Final = 8 * 1024**2
_MAX_HELLO_BYTES: Final = 1024
_ITEM_OVERHEAD_BYTES: Final = 64 * 1024

_Handler = Callable[[bytes, Call], bytes | Coroutine[Any, Any, bytes]]


class Copies(Protocol):
    """What this node has of sessions besides the storage."""

    def drop(self, keys: Sequence[str] | None) -> int:
        """Drop the copies of these sessions, None: of all; return this process, as its lease names it."""
        ...

    async def have_ends_settled(self) -> bool:
        """Wait for what this node is ending now; tell whether all that it has ended is settled."""
        ...


class PeerService:
    """Gossip, forwarded calls, invalidations and the order to leave; one for each node, on its event loop."""

    def __init__(
        self,
        name: str,
        peer_auth: PeerAuth,
        gossip: Callable[[], Gossip],
        calls: MethodTable,
        *,
        storage_now_us: Callable[[], int],
        copies: Copies,
        stop: Callable[[], None],
    ) -> None:
        """Wire the service to the parts of the node of this name.

        - `peer_auth` decides who is a peer, and proves the answers.
        - `gossip` returns the membership. It is asked with each call, because the port listens before the
          membership begins; until then it raises NotJoined.
        - `calls` handles forwarded calls. It is not the table of clients: nothing in it forwards again, and
          nothing in it asks for an API key.
        - `storage_now_us` is the storage's clock, in microseconds since the epoch.
        - `copies` are this node's.
        - `stop` begins the drain of this node, and returns at once.
        """
        self._name = name
        self._peer_auth = peer_auth
        self._gossip = gossip
        self._batches = ForwardedBatches(calls, storage_now_us=storage_now_us)
        self._copies = copies
        self._stop = stop
        self._forwardings: set[_Forwarding] = set()
        self._is_closed = False

    def add_to(self, table: MethodTable, *, max_message_bytes: int, max_members: int) -> None:
        """Add the methods to a table, behind the guard.

        `max_message_bytes` is the limit for clients, `max_members` the bound of a cluster.
        """
        limit = max(_MAX_MESSAGE_BYTES, max_message_bytes + _ITEM_OVERHEAD_BYTES)
        handlers: dict[str, tuple[_Handler, int]] = {
            "Gossip": (self._receive_packet, max_request_bytes(max_members)),
            "Invalidate": (self._invalidate, limit),
            "Leave": (self._leave, _MAX_HELLO_BYTES),
        }
        for name, (handle, max_bytes) in handlers.items():
            table.add_unary(SERVICE_NAME, name, self._guarded(name, handle), max_message_bytes=max_bytes)
        table.add_unary(SERVICE_NAME, HELLO, self._hello, max_message_bytes=_MAX_HELLO_BYTES)
        table.add_exchange(SERVICE_NAME, "Forward", self._begin_forwarding, max_message_bytes=limit)

    def close(self) -> None:
        """End the streams of forwarded calls, now and from now on, each when its batch is answered.

        A node that leaves calls it once the peers route by a ring without this node.
        """
        self._is_closed = True
        for forwarding in list(self._forwardings):
            forwarding.finish()

    def _guarded(self, method: str, handle: _Handler) -> UnaryHandler:
        """Return a handler that answers peers only, each with a proof."""

        def guarded(message: bytes, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
            key = self._checked(method, message, call)
            answer = handle(message, call)
            signature = call.metadata(METADATA_KEY) or ""
            return (
                _sealed(answer, key, signature)
                if isinstance(answer, bytes)
                else later(answer, key, signature)
            )

        async def later(answer: Coroutine[Any, Any, bytes], key: PeerKey, signature: str) -> bytes:
            with _malformed_as_status():
                return _sealed(await answer, key, signature)

        return guarded

    def _checked(self, method: str, body: bytes, call: Call) -> PeerKey:
        """Return the key for the answer to a peer. Raises Unauthenticated if the caller is none."""
        if not self._peer_auth.demands_proof and any(map(call.metadata, _PROXY_KEYS)):
            raise Unauthenticated(
                "mnemosyned: this node has no -cluster.secret and takes no peers from a proxy"
            )
        try:
            return self._peer_auth.check(
                call.metadata(METADATA_KEY),
                method,
                body,
                certificate_names=call.certificate_names,
                peer=call.peer,
                now_ms=time.time_ns() // 1_000_000,
            )
        except UnauthenticatedPeer as exc:
            raise _as_status(exc) from None

    def _hello(self, message: bytes, call: Call) -> bytes:
        key = self._checked(HELLO, message, call)
        callee = parsed(pb.HelloRequest, message).callee
        if callee not in ("", self._name):
            # With a proof from here, the caller would send what is for that node.
            raise NotOurCluster(f"mnemosyned: this node is {self._name}, and the call is for another one")
        proof = self._peer_auth.proof(call.metadata(METADATA_KEY) or "", key)
        return pb.HelloResponse(process=self._peer_auth.process, proof=proof).SerializeToString()

    def _receive_packet(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        with _malformed_as_status():
            return self._gossip().answer(message)

    def _begin_forwarding(self, call: Call, finish: Callable[[], None]) -> _Forwarding:
        # The opening signs an empty body, since no batch is there yet. It is accepted once, and each seal
        # covers it: without it a batch of another stream could be played back here.
        key = self._checked("Forward", b"", call)
        forwarding = _Forwarding(self, call, key, finish)
        self._forwardings.add(forwarding)
        if self._is_closed:
            finish()
        return forwarding

    def handle_batch(self, message: bytes, peer: str) -> bytes | Later[bytes]:
        """Return the serialized answers to a serialized batch of a peer."""
        batch = parsed(pb.Batch, message)
        self._check_origin(batch.origin)
        return self._batches.answer(batch, peer)

    def forget(self, forwarding: _Forwarding) -> None:
        """Take note that a stream has ended."""
        self._forwardings.discard(forwarding)

    def _invalidate(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        # Nothing is awaited between the parsing and the answer. When the answer is on the wire the copies are
        # gone and the gates of fills under way are closed: the writer may then acknowledge its write.
        request = parsed(pb.InvalidateRequest, message)
        self._check_origin(request.origin)
        answer = pb.InvalidateResponse(
            instance=self._copies.drop(None if request.everything else request.tokens)
        )
        return self._after_ends(answer) if request.await_ends else answer.SerializeToString()

    async def _after_ends(self, answer: pb.InvalidateResponse) -> bytes:
        answer.have_ends_settled = await self._copies.have_ends_settled()
        return answer.SerializeToString()

    def _leave(self, message: bytes, call: Call) -> bytes:
        if not self._peer_auth.demands_proof:
            raise Unauthenticated(
                "mnemosyned: this node has neither -cluster.secret nor -tls.peer-names: end it by SIGTERM"
            )
        # The command names its node, and not an origin: it knows no storage.
        if parsed(pb.LeaveRequest, message).node != self._name:
            raise NotOurCluster(f"mnemosyned: this node is {self._name}, and the call is for another one")
        log.info("asked_to_leave", extra={"peer": call.peer})
        self._stop()
        return pb.LeaveResponse().SerializeToString()

    def _check_origin(self, origin: pb.Origin) -> None:
        objection = self._gossip().objection(origin)
        if objection:
            raise NotOurCluster(f"mnemosyned: {objection}")


@contextmanager
def _malformed_as_status() -> Iterator[None]:
    try:
        yield
    except MalformedPacket as exc:
        raise MalformedMessage(f"mnemosyned: {exc}") from None


def _sealed(answer: bytes, key: PeerKey, signature: str) -> bytes:
    return pb.SealedAnswer(answer=answer, seal=key.seal(signature, answer)).SerializeToString()


def _as_status(exc: UnauthenticatedPeer) -> Unauthenticated:
    # `cluster` has errors of its own, since it may not import the daemon's. The text helps the people who run
    # the calling node; it says which setting to look at, and nothing of the secret.
    return Unauthenticated(f"mnemosyned: {exc}")


class _Forwarding:
    """The stream of one peer's batches. An Exchange."""

    def __init__(self, service: PeerService, call: Call, key: PeerKey, finish: Callable[[], None]) -> None:
        self._service = service
        self._peer = call.peer
        self._batches, self._answers = key.stream_macs(call.metadata(METADATA_KEY) or "")
        self.finish = finish

    def answer(self, message: bytes) -> bytes | Later[bytes]:
        request = parsed(pb.ForwardRequest, message)
        # Before the batch is parsed: bytes of an unauthenticated peer should reach little code.
        try:
            self._batches.check(request.seal, request.batch)
        except UnauthenticatedPeer as exc:
            raise _as_status(exc) from None
        answers = self._service.handle_batch(request.batch, self._peer)
        return self._sealed(answers) if isinstance(answers, bytes) else answers.map(self._sealed)

    def close(self) -> None:
        self._service.forget(self)

    def _sealed(self, answers: bytes) -> bytes:
        return pb.ForwardResponse(answers=answers, seal=self._answers.seal(answers)).SerializeToString()
