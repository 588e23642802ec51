"""The rows of the goals, by name; each is a generator of results and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from results import Curve, Result

from rows import (
    cached,
    idle,
    large,
    latency,
    listing,
    moving,
    nodes,
    redis,
    redis_expiry,
    redis_large,
    storage,
    workers,
)
from rows.setting import Bench

__all__ = ["ROWS", "Bench"]

ROWS: Final[dict[str, Callable[[Bench], Iterator[Result | Curve]]]] = {
    "cached": cached.one_token,
    "tokens": cached.many_tokens,
    "methods": cached.other_methods,
    "sessions": cached.many_sessions,
    "load": latency.under_load,
    "hop": nodes.forwarded,
    "nodes": nodes.three_nodes,
    "nodes-storage": nodes.storage_calls,
    "writes": storage.busy,
    "alone": storage.one_caller,
    "large": large.large_table,
    "redis": redis.busy,
    "redis-expiry": redis_expiry.expiry,
    "redis-large": redis_large.many_sessions,
    "list": listing.pages,
    "depth": listing.deep_pages,
    "touches": listing.under_touches,
    "moving": moving.there_and_back,
    "workers": workers.two_workers,
    "idle": idle.idle_nodes,
}
