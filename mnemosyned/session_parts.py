"""From a configuration to the sessions of a node: caches, lease, coherence and service (see assembly.py)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cache.backend import LruBackend
from cache.lru import Lru
from cache.read_through import ReadThrough
from cluster.lease import Lease
from cluster.mirrors import Grants
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.collectors import CacheCollector, LeaseCollector, SessionCollector
from mnemosyned.observe.metrics import UpkeepMetrics
from mnemosyned.observe.mirror_metrics import MirrorCollector
from mnemosyned.sessions.coherence import Coherence
from mnemosyned.sessions.config import CacheConfig, bag_limits, lifetime
from mnemosyned.sessions.damage_log import DamageLog
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.lease_gate import LeaseSettler
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.mirrors import Mirrors
from mnemosyned.sessions.service import ServiceRules, SessionService
from mnemosyned.sessions.token_index import TokenIndex
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.hashed import HashedStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.config.config import Config
    from mnemosyned.node import ClusterNode
    from mnemosyned.sessions.clock import StorageClock
    from mnemosyned.sessions.store import EngineStore, SharedStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParts:
    """The sessions of a node, and what keeps its copies of them true."""

    cache: ReadThrough[EncodedSession]  # of the sessions that the node owns
    keeper: LeaseKeeper | None  # None: nobody else has the storage
    mirrors: Mirrors | None  # as `keeper`
    coherence: Coherence
    touches: TouchWriter
    service: SessionService
    upkeep: UpkeepMetrics


def new_sessions(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    node: ClusterNode | None,
    registry: CollectorRegistry,
) -> SessionParts:
    """Return the sessions in a store, which need not be open yet; `node` is None without peers."""
    caches = _new_caches(config, store, clock, registry)
    keeper = _new_keeper(config, store, clock, caches, node)
    if keeper is not None:
        registry.register(LeaseCollector(keeper.counters, reason=keeper.reason, age_s=keeper.age_s))
    mirrors = _new_mirrors(config, clock, caches, keeper, registry)
    coherence = Coherence(caches.own, index=caches.index, settler=_settler(keeper, node), mirrors=mirrors)
    upkeep = UpkeepMetrics(registry)
    touches = TouchWriter(
        store,
        max_waiting=config[CacheConfig].max_sessions,
        lost=upkeep.touches_lost,
        on_gone=coherence.drop_copy,
        token_of=caches.token_shown_as,
    )
    service = SessionService(
        store,
        caches.own,
        touches,
        coherence=coherence,
        clock=clock,
        rules=ServiceRules(lifetime=lifetime(config), bag_limits=bag_limits(config)),
        damage_log=DamageLog(upkeep.damaged_sessions),
    )
    registry.register(SessionCollector(service.counts))
    return SessionParts(
        cache=caches.own,
        keeper=keeper,
        mirrors=mirrors,
        coherence=coherence,
        touches=touches,
        service=service,
        upkeep=upkeep,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caches:
    """Of the sessions that this node owns, and mirrors of others; with hashed tokens there are indexes."""

    own: ReadThrough[EncodedSession]
    index: TokenIndex | None
    mirrors: ReadThrough[EncodedSession]
    mirror_index: TokenIndex | None

    def drop_everything(self) -> None:
        self.own.drop_everything()
        self.mirrors.drop_everything()

    def token_shown_as(self, shown: str) -> str:
        """Return the token of the copy that List shows so, or what it shows."""
        for index in (self.index, self.mirror_index):
            if index is not None and (token := index.token_shown_as(shown)) != shown:
                return token
        return shown


def _new_caches(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    registry: CollectorRegistry,
) -> _Caches:
    limits = config[CacheConfig]
    entries: LruBackend[EncodedSession] = LruBackend(
        max_entries=limits.max_sessions, max_bytes=limits.max_bytes, now_us=clock.now_us
    )
    # Bound by bytes alone: its entries are tokens that clients choose, up to 4,096 bytes each. It needs the
    # cache's time to live, by which its entries grow old; without one it is off.
    negative: Lru[None] = Lru(max_entries=sys.maxsize, max_bytes=limits.negative_bytes if limits.ttl_s else 0)
    # With hashed tokens, other nodes name sessions by their hashes, which the cache does not have as keys.
    index, mirror_index = (
        TokenIndex(store.token_hasher) if isinstance(store, HashedStore) else None for _ in range(2)
    )
    cache = ReadThrough(entries, negative, observer=index)
    registry.register(
        CacheCollector(
            cache.counters,
            entries=lambda: len(entries),
            size_bytes=lambda: entries.size_bytes,
            negative_entries=lambda: len(negative),
        )
    )
    # Bound by bytes alone: each entry is of some size.
    mirrored: Lru[EncodedSession] = Lru(max_entries=sys.maxsize, max_bytes=limits.mirror_bytes)
    mirrors = ReadThrough(mirrored, observer=mirror_index)
    return _Caches(own=cache, index=index, mirrors=mirrors, mirror_index=mirror_index)


def _new_keeper(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    caches: _Caches,
    node: ClusterNode | None,
) -> LeaseKeeper | None:
    """Return what keeps the lease of a daemon whose storage others may use too, knowingly or not."""
    if not config[StorageConfig].engine.capabilities.is_shared:
        return None
    instance = int.from_bytes(os.urandom(8), "big") >> 1
    name = config[ClusterConfig].listen or f"alone-{instance:016x}"
    keeper = LeaseKeeper(
        cast("SharedStore", store),
        Lease(name, instance),
        clock,
        grants=Grants(max_tokens=config[CacheConfig].max_sessions, keep_us=lifetime(config).cache_us),
        drop_everything=caches.drop_everything,
        teller=None if node is None else node.forwarder,
    )
    if node is None:
        # A ring of its own: no other daemon takes it for one that routes alike.
        keeper.route_by(name)
    else:
        keeper.on_published = node.published
        keeper.on_doubt.append(node.storage_doubted)
    caches.own.may_fill = lambda: keeper.lease.is_valid(clock.uptime_us())
    return keeper


def _new_mirrors(
    config: Config,
    clock: StorageClock,
    caches: _Caches,
    keeper: LeaseKeeper | None,
    registry: CollectorRegistry,
) -> Mirrors | None:
    if keeper is None:
        return None
    mirrors = Mirrors(
        caches.own,
        caches.mirrors,
        index=caches.mirror_index,
        grants=keeper.grants,
        lease=keeper.lease,
        clock=clock,
        is_wanted=config[CacheConfig].mirror_bytes > 0,
    )
    keeper.on_rows, keeper.drop_mirrors = mirrors.met, mirrors.drop
    registry.register(MirrorCollector(mirrors.cache, mirrors.counters, keeper.counters))
    return mirrors


def _settler(keeper: LeaseKeeper | None, node: ClusterNode | None) -> LeaseSettler | None:
    if keeper is None:
        return None
    return LeaseSettler(keeper, (lambda _: True) if node is None else node.owns)
