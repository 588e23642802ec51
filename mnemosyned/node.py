"""This daemon as a node of a cluster: puts the parts of `cluster` together over one storage.

The life of a node
------------------
    constructed ── bind ── serve_peers ── the port listens ── run ── has_joined ── leave ── announce_left
                                                               |         |           |            |
    view:  alone, not active: every call past the cache ───────┴────> the ring ──> without     peers forget
           (a call for its own tokens leaves no copy)                              this node   this node

- Constructed: the node knows its name and its seeds. `bind` gives it the sessions, which were built with its
  `invalidator`: each needs the other, so one of them comes later.
- The port listens before `run`, because peers dial this node as soon as it joins. Until then the Peer
  service answers UNAVAILABLE.
- `run` waits for the storage's identity, because nodes of different tables must not share a ring. Then
  it joins.
- Until it has joined, the node handles calls past the cache: it does not know which nodes hold copies, and
  those nodes do not tell it of writes.
- `leave` gives the tokens to the other nodes. This node goes on handling its clients' calls, which it now
  forwards.
- `announce_left` is the last step, after the last call is answered. Without it the peers would suspect this
  node first, and log a dead member.

A new ring
----------
`_follow` gets each new view. It replaces one reference, so that the next call is routed by the new ring. The
copies of tokens that other nodes own now must go, for two reasons:

- Their new owner does not tell this node of writes once the old ring is settled (cluster/view_change.py).
  If the token came back, the copy would be served, though it is old.
- They occupy memory for calls that do not come any more.

They go in the sweep, a task, because a full cache has hundreds of thousands of keys. In the meantime no call
reads them: a token that another node owns is forwarded, or handled past the cache. That holds for one change
of the ring. At a second change during the sweep a token may come back that the sweep has not reached. The
sweep is then cancelled, and the whole cache is dropped.

The sweep also writes the expiries of the sessions. Their new owners read them from the storage, and would
otherwise see sessions expire earlier than this node has promised.

Which nodes are told of a write
-------------------------------
`RemoteCaches` is where the rule of `sessions/coherence.py` meets the ring.
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
from cluster.addresses import AddressRules
from cluster.forward import Forwarder
from cluster.gossip import Gossip
from cluster.identity import Identity
from cluster.member import Member, Phase, State
from cluster.peer_auth import PROCESS_BYTES, PeerAuth
from cluster.peers import SERVICE_NAME, Peers
from cluster.swim import Settings
from cluster.view import View, alone
from mnemosyned.api.peer import METHODS, PeerService
from mnemosyned.api.router import ClusterRouter, OwnerRouter
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.security.tls import peer_context
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

# Keys between two turns of the event loop. To find their owners takes about 1.5 ms, in which calls wait.
_SWEEP_KEYS: Final = 1000
# Between two questions for the storage's identity; the daemon is not ready before it has one.
_RETRY_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """This node's place in the cluster; node_config.py has the flags."""

    listen: str  # host:port, as peers dial it; also this node's name
    seeds: Sequence[str]  # host:port of other nodes; empty: this node begins a cluster
    label: str
    secrets: Sequence[str]  # the first signs, all are accepted
    peer_names: Sequence[str] = ()  # in the certificates of nodes
    max_message_bytes: int  # of a client's request, which may be forwarded
    max_members: int  # that this cluster may have; the table of members has no more
    cache_ttl_s: float  # how long a peer may serve a copy that it could not be told to drop


class RemoteCaches:
    """The Invalidator of a clustered node: decides from the view which nodes may have a copy.

    Only the owner of a token may keep a copy. This gives two cases for a write of this node:

    - This node owns the token, and has owned it by one settled view since before the write began. No other
      node can have a copy, and nothing is sent. This is the healthy case.
    - Otherwise every node is told: the owner did not get this write, or two nodes may disagree on the owner.

    "One settled view" is tested as one object, because a view never changes. `former` is empty once all nodes
    route by the new ring; `is_active` is false while this node joins.

    Why the view is compared from before the write to after it: a change of the ring in between may have given
    the token to a node that read the session before the write was committed.
    """

    def __init__(self, forwarder: Forwarder, view: Callable[[], View]) -> None:
        self._forwarder = forwarder
        self._view = view

    def routing(self) -> View:
        """See Invalidator."""
        return self._view()

    def after_write(self, tokens: Sequence[str], routed_by: object) -> Coroutine[Any, Any, None] | None:
        """See Invalidator."""
        # Remembered in any case: a node that owns the token by the next ring may have read it before.
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
        # Stored keys may be hashes, whose owners are not known here: no shortcut for own tokens.
        self._forwarder.changed(stored_keys)
        return self._forwarder.invalidate(stored_keys)


def _owns(view: View, token: str) -> bool:
    return view.is_alone or view.ring.owner(token) == view.me


@dataclass(frozen=True, slots=True)
class _Sessions:
    """The parts of this daemon that a change of the ring, or a call of a peer, concerns."""

    storage: Storage
    cache: ReadThrough[EncodedSession]
    coherence: Coherence
    touches: TouchWriter
    service: SessionService


class ClusterNode:
    """One node, from the construction of its method table until it has left the cluster.

    Calls are answered from the start; until `run` has found the other nodes, past the cache. No client should
    be sent here before `has_joined`: the other nodes are told of earlier writes only afterwards.
    """

    def __init__(self, options: NodeOptions, clock: StorageClock) -> None:
        """Make the node; `bind` gives it the sessions, which in turn need the node's `invalidator`."""
        self._options = options
        self._clock = clock
        self._bound: _Sessions | None = None
        self.client_stats = {name: MethodStats(SERVICE_NAME, name, "unary") for name in METHODS}
        self.peer_auth = PeerAuth(
            [secret.encode() for secret in options.secrets],
            options.peer_names,
            process=os.urandom(PROCESS_BYTES),
        )
        self._peers = Peers(
            self.peer_auth,
            self.client_stats,
            server_name=self._host_at,
            may_dial=AddressRules(options.seeds, own=options.listen).may_dial,
        )
        self.forwarder = Forwarder(self._peers, storage_now_us=clock.now_us, remember_s=options.cache_ttl_s)
        # Not active: no node tells this one of writes yet, so it must keep no copies.
        self.view = alone(options.listen, is_active=False)
        self.invalidator = RemoteCaches(self.forwarder, lambda: self.view)
        self.has_joined = asyncio.Event()  # set once this node knows its peers, or that it has none
        self.gossip: Gossip | None = None
        self._service: PeerService | None = None
        self._sweep: asyncio.Task[None] | None = None

    def bind(
        self,
        *,
        storage: Storage,
        cache: ReadThrough[EncodedSession],
        coherence: Coherence,
        touches: TouchWriter,
        service: SessionService,
    ) -> None:
        """Take the sessions; call it once, before the node serves or runs."""
        self._bound = _Sessions(storage, cache, coherence, touches, service)

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
        self._peers.identify(peer_context(material.files))

    def router(self, trace_context: Callable[[Call], Mapping[str, str]]) -> ClusterRouter:
        """Return the router for calls of clients."""
        return ClusterRouter(
            self._sessions.service, self.forwarder, view=lambda: self.view, trace_context=trace_context
        )

    def owner_router(self) -> OwnerRouter:
        """Return the router for calls that peers forward."""
        return OwnerRouter(self._sessions.service, view=lambda: self.view)

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
            drop=self._sessions.coherence.drop_copies,
            stop=stop,
        )
        self._service.add_to(
            table,
            max_message_bytes=self._options.max_message_bytes,
            max_members=self._options.max_members,
        )

    async def run(self) -> None:
        """Join the cluster and stay in it, until cancelled. The storage must be open, but may fail."""
        options = self._options
        if options.seeds and not self.peer_auth.demands_proof:
            log.warning("cluster_without_secret", extra={"peers_from": "this host only"})
        identity = Identity(label=options.label, storage_fingerprint=await self._storage_identity())
        me = Member(
            name=options.listen,
            address=await discovery.own_address(options.listen),
            # Milliseconds: a restarted node has a later one, and so its claims replace those of before.
            generation=time.time_ns() // 1_000_000,
            incarnation=0,
            state=State.ALIVE,
            phase=Phase.JOINING,
            # Tells two processes with one name apart, which is a mistake in the configuration.
            instance=int.from_bytes(os.urandom(8), "big") >> 1,
        )
        self.gossip = Gossip(
            me,
            identity,
            self._peers,
            seeds=options.seeds,
            on_view=self._follow,
            may_vouch=self.peer_auth.demands_proof,
            settings=Settings(max_members=options.max_members),
        )
        self.forwarder.bind(identity.message, self.gossip)
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
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)
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
            raise StorageUnavailable("mnemosyned: this node has not opened its storage yet")
        return self.gossip

    async def _storage_identity(self) -> bytes:
        """Return what tells this storage from others, however long the storage takes to answer."""
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
            # The last ring may have taken a token from this node, and this ring may give it back. If the
            # sweep has not reached it, its copy misses the writes of the owner in between.
            self._sweep.cancel()
            self._sessions.cache.drop_everything()
        # Owned here: it ends, or it is cancelled above or in `announce_left`.
        self._sweep = asyncio.create_task(self._drop_foreign_copies(view))

    async def _drop_foreign_copies(self, view: View) -> None:
        """Drop the copies of tokens that other nodes own now, and write their expiries."""
        # A call that was routed by the old view may not have opened its fill yet: its task has begun and
        # waits for its turn. After two turns of the loop its fill is open, `keys` has it, and `drop` closes
        # its gate.
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
            # The expiries wait for the writer's next round, within the touch interval.
            log.debug("touches_wait", extra={"error": str(exc)})
