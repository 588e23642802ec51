"""This daemon as a node of a cluster: puts the parts of `cluster` together over one storage.

The life of a node
------------------
    constructed ── bind ── serve_peers ── the port listens ── run ── has_joined ── leave ── announce_left
                                                               |         |           |            |
    view:  alone, not active: every call past the cache ───────┴────> the ring ──> without     peers forget
           (a call for its own tokens leaves no copy)                              this node   this node

- Constructed: the node knows its name and its seeds. `bind` gives it the sessions, whose lease was built with
  its `forwarder`: each needs the other, so one of them comes later.
- The port listens before `run`, because peers dial this node as soon as it joins. Until then the Peer
  service answers UNAVAILABLE.
- `run` waits for the storage's identity, because nodes of different tables must not share a ring. Then
  it joins.
- Until it has joined, the node handles calls past the cache: it does not know which tokens it will own.
- `leave` gives the tokens to the other nodes. This node goes on handling its clients' calls, which it now
  forwards.
- `announce_left` is the last step, after the last call is answered. Without it the peers would suspect this
  node first, and log a dead member.

A new ring
----------
`_follow` gets each new view. It replaces one reference, so that the next call is routed by the new ring, and
has the lease publish it. Copies of tokens that this node owned all the time are served on. `keeps` decides
that by the rings since the copy was made, so nothing walks through the cache: the copies of other tokens are
not read any more, and leave it as the oldest do.

The expiries of sessions are written at once. Their new owners read them from the storage, and would otherwise
see sessions expire earlier than this node has promised.

When the ring has been published long enough (`cluster/lease.py`), the tokens that it has brought may have
copies too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

from cluster import discovery
from cluster.addresses import AddressRules
from cluster.forward import Forwarder
from cluster.gossip import Gossip
from cluster.identity import Identity
from cluster.lease import ACTIVATION_US
from cluster.member import Member, Phase, State
from cluster.peer_auth import PROCESS_BYTES, PeerAuth
from cluster.peers import Peers
from cluster.signing import SERVICE_NAME
from cluster.swim import Settings
from cluster.view import View, alone
from mnemosyned.api.owner_router import OwnerRouter
from mnemosyned.api.peer import METHODS, PeerService
from mnemosyned.api.router import ClusterRouter
from mnemosyned.errors import MnemosyneError, NotJoined, StorageUnavailable
from mnemosyned.security.tls import peer_context
from mnemosyned.sessions.lease_gate import LeaseGate
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.transport.call import MethodStats
from mnemosyned.transport.engine import UNIX_PEER

if TYPE_CHECKING:
    from cache.read_through import ReadThrough
    from mnemosyned.security.tls import TlsMaterial
    from mnemosyned.sessions.clock import StorageClock
    from mnemosyned.sessions.coherence import Coherence
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.mirrors import Mirrors
    from mnemosyned.sessions.service import SessionService
    from mnemosyned.sessions.store import Storage
    from mnemosyned.sessions.touches import TouchWriter
    from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable

log = logging.getLogger(__name__)

# A node leaves the ring when its storage has not answered for so long, and comes back when it has. Each
# change of the ring costs copies, so a storage that was only slow causes none.
_AWAY_AFTER_S: Final = 0.7
_BACK_AFTER_S: Final = 1.0
# Rings that are remembered to judge copies by; an older copy is dropped.
_MAX_RINGS: Final = 16
# Between two questions for the storage's identity; the daemon is not ready before it has one.
_RETRY_S: Final = 0.5
_US_PER_S: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """This node's place in the cluster; node_config.py has the flags."""

    listen: str  # host:port, as peers dial it; also this node's name
    seeds: Sequence[str]  # host:port of other nodes; empty: this node begins a cluster
    public: str = ""  # host:port, as clients dial it; empty: not told
    label: str
    secrets: Sequence[str]  # the first signs, all are accepted
    peer_names: Sequence[str] = ()  # in the certificates of nodes
    max_message_bytes: int  # of a client's request, which may be forwarded
    max_members: int  # that this cluster may have; the table of members has no more
    siblings: Mapping[str, str] = field(default_factory=dict)  # Unix sockets of this daemon's other workers


@dataclass(frozen=True, slots=True)
class _Sessions:
    """The parts of this daemon that a change of the ring, or a call of a peer, concerns."""

    storage: Storage
    cache: ReadThrough[EncodedSession]
    keeper: LeaseKeeper
    coherence: Coherence
    touches: TouchWriter
    service: SessionService
    mirrors: Mirrors


class ClusterNode:
    """One node, from the construction of its method table until it has left the cluster.

    Calls are answered from the start; until `run` has found the other nodes, past the cache. No client should
    be sent here before `has_joined`: the other nodes are told of earlier writes only afterwards.
    """

    def __init__(self, options: NodeOptions, clock: StorageClock) -> None:
        """Make the node; `bind` gives it the sessions, whose lease needs the node's `forwarder`."""
        self._options = options
        self._clock = clock
        self._bound: _Sessions | None = None
        self._sockets = dict(options.siblings)  # by address
        self.client_stats = {name: MethodStats(SERVICE_NAME, name, "unary") for name in METHODS}
        self.peer_auth = PeerAuth(
            [secret.encode() for secret in options.secrets],
            options.peer_names,
            process=os.urandom(PROCESS_BYTES),
            trusted_peer=UNIX_PEER if options.siblings else None,
        )
        self._peers = Peers(
            self.peer_auth,
            self.client_stats,
            server_name=self._host_at,
            may_dial=AddressRules(options.seeds, own=options.listen).may_dial,
            socket_at=lambda address: self._sockets.get(address, ""),
        )
        self.forwarder = Forwarder(self._peers, storage_now_us=clock.now_us)
        # Not active: it does not know yet which tokens it will own.
        self.view = alone(options.listen, is_active=False)
        # The view of each generation of the cache, the last ones.
        self._views: deque[tuple[int, View]] = deque([(0, self.view)], maxlen=_MAX_RINGS)
        self.has_joined = asyncio.Event()  # set once this node knows its peers, or that it has none
        self.gossip: Gossip | None = None
        self._service: PeerService | None = None
        self._router: ClusterRouter | None = None
        self._turning: asyncio.TimerHandle | None = None  # off the ring, or back
        self._flush: asyncio.Task[None] | None = None
        self._settling: View | None = None  # it has been published

    def bind(
        self,
        *,
        storage: Storage,
        cache: ReadThrough[EncodedSession],
        keeper: LeaseKeeper,
        coherence: Coherence,
        touches: TouchWriter,
        service: SessionService,
        mirrors: Mirrors,
    ) -> None:
        """Take the sessions; call it once, before the node serves or runs."""
        self._bound = _Sessions(storage, cache, keeper, coherence, touches, service, mirrors)
        cache.keeps = self._keeps

    @property
    def keeper(self) -> LeaseKeeper | None:
        """What keeps this node's lease; None: not yet bound."""
        return None if self._bound is None else self._bound.keeper

    @property
    def _sessions(self) -> _Sessions:
        assert self._bound is not None
        return self._bound

    async def identify(self, material: TlsMaterial) -> None:
        """Dial peers over TLS from now on, with this identity.

        Connections that peers have dialled stay open. They end with the peers' own new identity, or at their
        age.

        A follower of the TLS files (security/file_reloader.py): taking the same identity twice does no harm.

        Raises:
            FilesUnusable: the files have changed once more, and are invalid.
        """
        self._peers.identify(await asyncio.to_thread(peer_context, material.files))

    def renew_secrets(self, secrets: Sequence[str]) -> None:
        """Use these secrets from now on, the first one for what this node says.

        Connections to peers are opened anew with it. Those that peers have opened stay while their secret is
        among these.

        Raises:
            ValueError: see PeerAuth.
        """
        self.peer_auth.renew([secret.encode() for secret in secrets])
        self._peers.dial_again()

    def router(self, trace_context: Callable[[Call], Mapping[str, str]]) -> ClusterRouter:
        """Return the router for calls of clients."""
        self._router = ClusterRouter(
            self._sessions.service,
            self.forwarder,
            view=lambda: self.view,
            gate=LeaseGate(self._sessions.keeper),
            mirrors=self._sessions.mirrors,
            is_away=lambda: self.is_away,
            trace_context=trace_context,
        )
        return self._router

    def owner_router(self) -> OwnerRouter:
        """Return the router for calls that peers forward."""
        sessions = self._sessions
        return OwnerRouter(
            sessions.service,
            view=lambda: self.view,
            gate=LeaseGate(sessions.keeper),
            mirrors=sessions.mirrors,
        )

    def serve_peers(self, table: MethodTable, calls: MethodTable, *, stop: Callable[[], None]) -> None:
        """Add the Peer service to a table.

        `calls` handles what peers forward. `stop` begins the drain of this daemon; a peer's Leave calls it.
        """
        self._service = PeerService(
            self._options.listen,
            self.peer_auth,
            self._joined,
            calls,
            storage_now_us=self._clock.now_us,
            copies=self,
            stop=stop,
        )
        self._service.add_to(
            table,
            max_message_bytes=self._options.max_message_bytes,
            max_members=self._options.max_members,
        )

    def drop(self, keys: Sequence[str] | None) -> int:
        """See Copies: drop what another node names."""
        sessions = self._sessions
        sessions.mirrors.recall(lambda: sessions.coherence.drop_copies(keys))
        return sessions.keeper.lease.instance

    async def have_ends_settled(self) -> bool:
        """See Copies."""
        return await self._sessions.coherence.have_ends_settled()

    async def run(self) -> None:
        """Join the cluster and stay in it, until cancelled. The storage must be open, but may fail."""
        options = self._options
        if options.seeds and not self.peer_auth.demands_proof:
            log.warning("cluster_without_secret", extra={"peers_from": "this host only"})
        identity = Identity(label=options.label, storage_fingerprint=await self._storage_identity())
        address = await discovery.own_address(options.listen)
        # Siblings announce addresses of this host too.
        self._sockets |= {
            f"{address.rpartition(':')[0]}:{name.rpartition(':')[2]}": path
            for name, path in options.siblings.items()
        }
        me = Member(
            name=options.listen,
            address=address,
            # Milliseconds: a restarted node has a later one, and so its claims replace those of before.
            generation=time.time_ns() // 1_000_000,
            incarnation=0,
            state=State.ALIVE,
            phase=Phase.JOINING,
            # Tells two processes with one name apart, which is a mistake in the configuration.
            instance=int.from_bytes(os.urandom(8), "big") >> 1,
            public=options.public,
        )
        self.gossip = Gossip(
            me,
            identity,
            self._peers,
            seeds=[*options.seeds, *options.siblings],
            on_view=self._follow,
            may_vouch=self.peer_auth.demands_proof,
            settings=Settings(max_members=options.max_members),
        )
        self.forwarder.bind(identity.message, self.gossip)
        self.gossip.on_answering = self.forwarder.answers_again
        self.gossip.start()
        await self.forwarder.run()

    async def leave(self) -> None:
        """Give this node's tokens to the other nodes; about a second. This node still handles calls.

        The streams of forwarded calls end after the peers route by a ring without this node. In the other
        sequence they would forward calls to a node that refuses them.
        """
        if self.gossip is not None:
            await self.gossip.leave()
        if self._service is not None:
            self._service.close()

    async def announce_left(self) -> None:
        """Tell the peers that this node has left, and close all connections; call it after the last call."""
        if self.gossip is not None:
            await self.gossip.announce_left()
        if self._turning is not None:
            self._turning.cancel()
        if self._flush is not None:
            self._flush.cancel()
            await asyncio.gather(self._flush, return_exceptions=True)
        await self.forwarder.close()
        await self._peers.close()

    def probes(self) -> dict[str, str]:
        """Return each other member's state, as `/healthr` shows it. Runs on a thread of the admin port.

        A suspect is SERVING: most suspects refute it, and none of this changes whether this node is ready.
        """
        if self.gossip is None:
            return {}
        return {
            member.name: "NOT_SERVING" if member.state >= State.DEAD else "SERVING"
            # A copy, made in one step: the event loop may change the table while it is read.
            for member in list(self.gossip.swim.table)
            if member.name != self._options.listen
        }

    def _host_at(self, address: str) -> str:
        return address.rpartition(":")[0] if self.gossip is None else self.gossip.host_at(address)

    def _joined(self) -> Gossip:
        if self.gossip is None:
            raise NotJoined
        return self.gossip

    async def _storage_identity(self) -> bytes:
        """Return what tells this storage from others, however long the storage takes to answer."""
        while True:
            try:
                return await self._sessions.storage.identity()
            except StorageUnavailable as exc:
                log.debug("storage_identity_waits", extra={"error": str(exc)})
                await asyncio.sleep(_RETRY_S)

    # Without the storage.

    @property
    def is_away(self) -> bool:
        """Whether this node's storage does not answer, so that other members had better be asked."""
        return self._sessions.keeper.is_in_doubt or (self.gossip is not None and self.gossip.is_away)

    def storage_doubted(self, is_in_doubt: bool) -> None:  # noqa: FBT001  # a callback with one argument
        """Leave the ring if the storage does not answer for a while; come back when it has for a while."""
        if self._turning is not None:
            self._turning.cancel()
        if is_in_doubt and self._router is not None:
            self._router.leave_storage()
        turn, after_s = (self._withdraw, _AWAY_AFTER_S) if is_in_doubt else (self._come_back, _BACK_AFTER_S)
        self._turning = asyncio.get_running_loop().call_later(after_s, turn)

    def _withdraw(self) -> None:
        if self.gossip is not None and self.gossip.swim.me.phase is Phase.ACTIVE:
            log.warning("left_ring", extra={"reason": "the storage does not answer"})
            self.gossip.withdraw()

    def _come_back(self) -> None:
        if self.gossip is not None and self.gossip.is_away:
            log.info("on_ring_again", extra={"reason": "the storage answers"})
            self.gossip.come_back()

    def owns(self, token: str) -> bool:
        """Tell whether this node owns a token, by its ring and by all rings that others may still use."""
        return self.view.owns(token)

    def published(self, ring: str) -> None:
        """Take note that the store has a ring of this node."""
        view = self.view
        if view.former and ring == view.routed and view is not self._settling:
            self._settling = view
            asyncio.get_running_loop().call_later(ACTIVATION_US / _US_PER_S, self._settle, view)

    def _settle(self, view: View) -> None:
        if self.gossip is not None:
            self.gossip.settle(view)

    def _keeps(self, token: str, generation: int) -> bool:
        """Tell whether this node has owned a token ever since a generation of the cache."""
        since = generation - self._views[0][0]
        if since < 0:
            return False
        return all(
            view.routed and (view.is_alone or view.ring.owner(token) == view.me)
            for view in islice((view for _, view in self._views), since, None)
        )

    def _follow(self, view: View) -> None:
        """Route by a new view, and have the store know its ring."""
        old, self.view = self.view, view
        self.forwarder.follow(view)
        sessions = self._sessions
        if (view.ring.nodes, view.is_active) != (old.ring.nodes, old.is_active):
            sessions.cache.change_generation()
            sessions.mirrors.follow(view)
            self._views.append((sessions.cache.generation, view))
            if self._flush is None or self._flush.done():
                # Owned here: it ends, or is cancelled in `announce_left`.
                self._flush = asyncio.create_task(self._write_expiries())
        sessions.keeper.route_by(view.routed)
        if view.is_active:
            self.has_joined.set()

    async def _write_expiries(self) -> None:
        try:
            await self._sessions.touches.flush()
        except MnemosyneError as exc:
            # The expiries wait for the writer's next round, within the touch interval.
            log.debug("touches_wait", extra={"error": str(exc)})
