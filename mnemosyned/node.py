"""This daemon as a node of a cluster: puts the parts of `cluster` together over one storage.

`RemoteCaches` is where the rule of `sessions/coherence.py` meets the ring: it decides which nodes must be
told of a write.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cluster import discovery
from cluster.forward import Forwarder
from cluster.gossip import Gossip
from cluster.identity import Identity
from cluster.member import Member, Phase, State
from cluster.peer_auth import PeerAuth
from cluster.peers import SERVICE_NAME, Peers, TlsIdentity
from cluster.view import View, alone
from mnemosyned.api.peer import METHODS, PeerService
from mnemosyned.api.router import ClusterRouter, OwnerRouter
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.transport.call import MethodStats

if TYPE_CHECKING:
    from cache.read_through import ReadThrough
    from mnemosyned.security.tls import TlsMaterial
    from mnemosyned.sessions.clock import StorageClock
    from mnemosyned.sessions.coherence import Coherence
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.service import SessionService
    from mnemosyned.sessions.store import Storage
    from mnemosyned.sessions.touches import TouchWriter
    from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable

log = logging.getLogger(__name__)

_SWEEP_KEYS: Final = 1000
_RETRY_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """This node's place in the cluster."""

    listen: str
    seeds: Sequence[str]
    label: str
    secrets: Sequence[str]
    peer_names: Sequence[str] = ()  # in the certificates of nodes
    max_message_bytes: int
    cache_ttl_s: float


class RemoteCaches:
    """The Invalidator of a clustered node: decides from the view which nodes may have a copy.

    A node may keep copies of the tokens that it owns. If this node owns a token, and has owned it by one
    settled view since before the write began, no other node can have a copy: then nothing is sent, which is
    the healthy case. Otherwise two nodes may disagree on the owner, or the owner did not get this write, so
    every node is told.
    """

    def __init__(self, forwarder: Forwarder, view: Callable[[], View]) -> None:
        self._forwarder = forwarder
        self._view = view

    def routing(self) -> View:
        """See Invalidator."""
        return self._view()

    def after_write(self, tokens: Sequence[str], routed_by: object) -> Coroutine[Any, Any, None] | None:
        """See Invalidator."""
        self._forwarder.changed(tokens)
        view = self._view()
        if view is routed_by and view.is_active and not view.former:
            tokens = [token for token in tokens if not _owns(view, token)]
        if not tokens or not view.address_by_name:
            return None
        return self._forwarder.invalidate_everywhere(tokens)

    def give_up(self, tokens: Sequence[str]) -> None:
        """See Invalidator."""
        self._forwarder.ask_nothing_before(tokens)

    def after_delete(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """See Invalidator."""
        self._forwarder.changed(stored_keys)
        return self._forwarder.invalidate(stored_keys)


def _owns(view: View, token: str) -> bool:
    return view.is_alone or view.ring.owner(token) == view.me


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """The parts of this daemon that a change of the ring or a call of a peer reaches."""

    storage: Storage
    cache: ReadThrough[EncodedSession]
    coherence: Coherence
    touches: TouchWriter
    service: SessionService


class ClusterNode:
    """One node, from the construction of its method table until it has left the cluster.

    Calls are answered from the start; until `run` has found the other nodes, past the cache. No client should
    be sent here before `has_joined`: the other nodes hear of earlier writes only afterwards.
    """

    def __init__(self, options: NodeOptions, clock: StorageClock) -> None:
        """Make the node; `bind` gives it the sessions, which in turn need the node's `invalidator`."""
        self._options = options
        self._clock = clock
        self._bound: Sessions | None = None
        self.client_stats = {name: MethodStats(SERVICE_NAME, name, "unary") for name in METHODS}
        self.peer_auth = PeerAuth([secret.encode() for secret in options.secrets], options.peer_names)
        self._peers = Peers(self.peer_auth, self.client_stats, server_name=self._host_at)
        self.forwarder = Forwarder(self._peers, storage_now_us=clock.now_us, remember_s=options.cache_ttl_s)
        self.view = alone(options.listen, is_active=False)
        self.invalidator = RemoteCaches(self.forwarder, lambda: self.view)
        self.has_joined = asyncio.Event()  # set once it knows its peers, or that there are none
        self.gossip: Gossip | None = None
        self._service: PeerService | None = None
        self._sweep: asyncio.Task[None] | None = None

    def bind(self, sessions: Sessions) -> None:
        """Take the sessions; call it once, before the node serves or runs."""
        self._bound = sessions

    @property
    def _sessions(self) -> Sessions:
        assert self._bound is not None
        return self._bound

    async def identify(self, material: TlsMaterial) -> None:
        """Dial peers over TLS from now on, with this identity, and have peers dial this node again."""
        self._peers.identify(
            TlsIdentity(
                certificate=material.certificate,
                private_key=material.private_key,
                authorities=material.authorities,
            )
        )
        if self._service is not None:
            # Their connections end with the certificate, and calls under way with them.
            self._service.end_streams()

    def router(self, trace_context: Callable[[Call], Mapping[str, str]]) -> ClusterRouter:
        """Return the router for calls of clients."""
        return ClusterRouter(
            self._sessions.service, self.forwarder, view=lambda: self.view, trace_context=trace_context
        )

    def owner_router(self) -> OwnerRouter:
        """Return the router for calls that peers forward."""
        return OwnerRouter(self._sessions.service, view=lambda: self.view)

    def serve_peers(self, table: MethodTable, calls: MethodTable, *, stop: Callable[[], None]) -> None:
        """Add the Peer service to a table; `calls` handles what is forwarded."""
        self._service = PeerService(
            self._joined,
            calls,
            storage_now_us=self._clock.now_us,
            drop=self._sessions.coherence.drop_copies,
            stop=stop,
        )
        self._service.add_to(table, self.peer_auth, max_message_bytes=self._options.max_message_bytes)

    async def run(self) -> None:
        """Join the cluster and stay in it, until cancelled; the storage is open."""
        options = self._options
        if options.seeds and not self.peer_auth.reaches_elsewhere:
            log.warning("cluster_without_secret", extra={"peers_from": "this host only"})
        identity = Identity(label=options.label, storage_fingerprint=await self._storage_identity())
        me = Member(
            name=options.listen,
            address=await discovery.own_address(options.listen),
            generation=time.time_ns() // 1_000_000,
            incarnation=0,
            state=State.ALIVE,
            phase=Phase.JOINING,
            instance=int.from_bytes(os.urandom(8), "big") >> 1,
        )
        self.gossip = Gossip(me, identity, self._peers, seeds=options.seeds, on_view=self._follow)
        self.forwarder.bind(identity.message, self.gossip)
        self.gossip.start()
        await self.forwarder.run()

    async def leave(self) -> None:
        """Hand this node's tokens over; it goes on answering its clients."""
        if self.gossip is not None:
            await self.gossip.leave()
        if self._service is not None:
            self._service.close()

    async def announce_left(self) -> None:
        """Tell the peers that this node has left; the last call is answered."""
        if self.gossip is not None:
            await self.gossip.announce_left()
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)
        await self.forwarder.close()
        await self._peers.close()

    def probes(self) -> dict[str, str]:
        """Return each other member's state, as readiness shows it."""
        if self.gossip is None:
            return {}
        return {
            member.name: "NOT_SERVING" if member.state >= State.DEAD else "SERVING"
            for member in list(self.gossip.swim.table)
            if member.name != self._options.listen
        }

    def _host_at(self, address: str) -> str:
        return address.rpartition(":")[0] if self.gossip is None else self.gossip.host_at(address)

    def _joined(self) -> Gossip:
        if self.gossip is None:
            raise StorageUnavailable("mnemosyned: this node has not opened its storage yet")
        return self.gossip

    async def _storage_identity(self) -> bytes:
        while True:
            try:
                return await self._sessions.storage.identity()
            except StorageUnavailable as exc:
                log.debug("storage_identity_waits", extra={"error": str(exc)})
                await asyncio.sleep(_RETRY_S)

    def _follow(self, view: View) -> None:
        """Route by a new view, and drop the copies of tokens that other nodes own now."""
        is_same_ring = view.ring.nodes == self.view.ring.nodes
        self.view = view
        self.forwarder.follow(view)
        if view.is_active:
            self.has_joined.set()
        if is_same_ring:
            return
        if self._sweep is not None and not self._sweep.done():
            # A copy that the last ring took away and this one gives back may not have been dropped in
            # between.
            self._sweep.cancel()
            self._sessions.cache.drop_everything()
        # Owned here until it ends, is cancelled above, or by `announce_left`.
        self._sweep = asyncio.create_task(self._drop_foreign_copies(view))

    async def _drop_foreign_copies(self, view: View) -> None:
        """Drop the sessions that other nodes own now, and write their expiries."""
        # Loads that were begun under the old view have opened their fills by the next turn but one.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        keys = self._sessions.cache.keys()
        for start in range(0, len(keys), _SWEEP_KEYS):
            for key in keys[start : start + _SWEEP_KEYS]:
                if view.ring.owner(key) != view.me:
                    self._sessions.cache.drop(key)
            await asyncio.sleep(0)
        try:
            await self._sessions.touches.flush()
        except MnemosyneError as exc:
            # They wait for the writer's next round.
            log.debug("touches_wait", extra={"error": str(exc)})
