"""This daemon as a node of a cluster: the parts of `cluster`, put together over one storage."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cluster import discovery
from cluster.forward import Forwarder
from cluster.gossip import Gossip, Identity
from cluster.member import Member, Phase, State
from cluster.peer_auth import PeerAuth
from cluster.peers import SERVICE_NAME, Peers, TlsIdentity
from cluster.view import View, alone
from mnemosyned.api.peer import METHODS, PeerService
from mnemosyned.api.router import ClusterRouter, OwnerRouter, Services
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.observe.metrics import MethodStats

if TYPE_CHECKING:
    from cache.read_through import ReadThrough
    from mnemosyned.security.tls import TlsMaterial
    from mnemosyned.sessions.clock import StorageClock
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.service import SessionService
    from mnemosyned.sessions.store import SessionStore
    from mnemosyned.sessions.touches import TouchWriter
    from mnemosyned.transport.methods import Call, MethodTable

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """What of this daemon's sessions the cluster concerns."""

    store: SessionStore
    clock: StorageClock
    cache: ReadThrough[EncodedSession]
    touches: TouchWriter


class ClusterNode:
    """One node, from the construction of its method table to its announce_left.

    Calls are answered from the start: until `run` has found the others, past the cache. Nobody should be
    sent here before `has_joined`, though: what is written until then, the others hear of only afterwards.
    """

    def __init__(self, options: NodeOptions, sessions: Sessions) -> None:
        self._options = options
        self._sessions = sessions
        self.client_stats = {name: MethodStats(SERVICE_NAME, name, "unary") for name in METHODS}
        self.trust = PeerAuth([secret.encode() for secret in options.secrets], options.peer_names)
        self._peers = Peers(self.trust, self.client_stats, server_name=self._host_at)
        self.forwarder = Forwarder(
            self._peers,
            storage_now_us=sessions.clock.now_us,
            remember_s=options.cache_ttl_s,
        )
        self.view = alone(options.listen, is_active=False)
        self.has_joined = asyncio.Event()  # set for good when it knows its peers, or that there are none
        self.gossip: Gossip | None = None
        self._service: PeerService | None = None
        self._sweep: asyncio.Task[None] | None = None

    async def identify(self, material: TlsMaterial) -> None:
        """Dial peers over TLS from now on, with this identity, and have them dial this node anew."""
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

    def services(self, owned: SessionService, passing: SessionService) -> Services:
        """Return the services that routers choose between."""
        return Services(owned, passing, self.forwarder, lambda: self.view)

    def router(self, services: Services, trace_context: Callable[[Call], Mapping[str, str]]) -> ClusterRouter:
        """Return the router for calls of clients."""
        return ClusterRouter(services, self.forwarder, trace_context)

    def owner_router(self, services: Services) -> OwnerRouter:
        """Return the router for calls that peers forward."""
        return OwnerRouter(services)

    def serve_peers(self, table: MethodTable, calls: MethodTable, *, stop: Callable[[], None]) -> None:
        """Add the Peer service to a table; `calls` answers what is forwarded."""
        self._service = PeerService(
            self._joined, calls, storage_now_us=self._sessions.clock.now_us, drop=self._drop, stop=stop
        )
        self._service.add_to(table, self.trust, max_message_bytes=self._options.max_message_bytes)

    async def run(self) -> None:
        """Join the cluster and stay in it, for ever; the storage is open."""
        options = self._options
        if options.seeds and not self.trust.reaches_elsewhere:
            log.warning("cluster_without_secret", extra={"peers_from": "this host only"})
        identity = Identity(label=options.label, storage_fingerprint=await self._storage_fingerprint())
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
        """Leave for good, when the last call is answered."""
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

    async def _storage_fingerprint(self) -> bytes:
        while True:
            try:
                return await self._sessions.store.fingerprint()
            except StorageUnavailable as exc:
                log.debug("storage_fingerprint_waits", extra={"error": str(exc)})
                await asyncio.sleep(_RETRY_S)

    def _drop(self, tokens: Sequence[str] | None) -> None:
        """Drop copies of these sessions, or of all."""
        if tokens is None:
            self._sessions.cache.drop_everything()
            return
        for token in tokens:
            self._sessions.cache.drop(token)

    def _follow(self, view: View) -> None:
        """Route by a new view, and let go of what is others' now."""
        is_same_ring = view.ring.nodes == self.view.ring.nodes
        self.view = view
        self.forwarder.follow(view)
        if view.is_active:
            self.has_joined.set()
        if is_same_ring:
            return
        if self._sweep is not None and not self._sweep.done():
            # What that ring took away and this one gives back may not have been dropped in between.
            self._sweep.cancel()
            self._drop(None)
        # Owned here until it ends, is cancelled above, or by `announce_left`.
        self._sweep = asyncio.create_task(self._let_go(view))

    async def _let_go(self, view: View) -> None:
        """Drop the sessions that others own now and write their expiries."""
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
            # They wait for the next round of the writer.
            log.debug("touches_wait", extra={"error": str(exc)})
