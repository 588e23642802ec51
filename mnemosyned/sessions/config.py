"""The settings of sessions, their bags and their cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from aio.units import US_PER_S
from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import duration, integer, size
from mnemosyned.sessions.lifetime import Lifetime
from mnemosyned.sessions.model import MAX_BAG_BYTES

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.bag import BagLimits

_ANY_SIZE: Final = 2**50
_MAX_TOUCH_INTERVAL_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsConfig(Section):
    """How long sessions live, and what a bag may hold."""

    TITLE = "Sessions"
    EXAMPLE = "mnemosyned -ttl=30m -bag.max-value=64KiB"

    ttl_s: float = setting(
        "ttl", "24m", duration(1), "time to live: how long after its last Get a session ends"
    )
    ttc_s: float = setting("ttc", "1m", duration(1), "time to clear: how often expired sessions are removed")
    touch_interval_s: float = setting(
        "touch.interval",
        "0",
        duration(0),
        "how late the storage learns of an extended expiry; 0: a tenth of -ttl, at most 10s",
    )
    bag_max_entries: int = setting("bag.max-entries", "10000", integer(1, 10**6), "entries in one bag")
    bag_max_key_bytes: int = setting(
        "bag.max-key", "64KiB", size(1, MAX_BAG_BYTES), "longest key in a bag, in bytes, KiB or MiB"
    )
    bag_max_value_bytes: int = setting(
        "bag.max-value",
        "4000000",
        size(1, MAX_BAG_BYTES),
        "longest value in a bag, in bytes, KiB or MiB; a whole bag has at most 4000000 bytes",
    )

    def resolved(self, _: Mapping[str, str]) -> Self:
        """See Section."""
        if self.touch_interval_s:
            return self
        return replace(self, touch_interval_s=min(self.ttl_s / 10, _MAX_TOUCH_INTERVAL_S))

    def check(self, _: Config) -> None:
        """See Section."""
        if self.touch_interval_s > self.ttl_s / 4:
            raise ConfigError("flag -touch.interval: more than a quarter of -ttl")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(Section):
    """What is kept in memory of sessions."""

    TITLE = "Cache"
    EXAMPLE = "mnemosyned -cache.size=1000000 -cache.bytes=2GiB"

    max_sessions: int = setting("cache.size", "100000", integer(1, 10**9), "sessions in the cache")
    max_bytes: int = setting(
        "cache.bytes", "256MiB", size(1024**2, _ANY_SIZE), "memory of the cache, in bytes, KiB, MiB or GiB"
    )
    ttl_s: float = setting(
        "cache.ttl",
        "1m",
        duration(0),
        "how long a cached session is served before it is read from the storage again; 0: no cache",
    )
    negative_bytes: int = setting(
        "cache.negative.bytes",
        "32MiB",
        size(0, _ANY_SIZE),
        "memory that remembers unknown tokens for -cache.ttl, about 480 bytes each; 0: none",
    )
    mirror_bytes: int = setting(
        "mirror.bytes",
        "64MiB",
        size(0, _ANY_SIZE),
        "memory of a node for copies of sessions that other nodes own, in bytes, KiB, MiB or GiB; 0: none",
    )


def lifetime(config: Config) -> Lifetime:
    """Return the rules of time that the configuration sets."""
    sessions, cache = config[SessionsConfig], config[CacheConfig]
    return Lifetime(
        idle_us=int(sessions.ttl_s * US_PER_S),
        cache_us=int(cache.ttl_s * US_PER_S),
        touch_interval_us=int(sessions.touch_interval_s * US_PER_S),
    )


def bag_limits(config: Config) -> BagLimits:
    """Return what the configuration lets callers put into a bag."""
    from mnemosyned.sessions.bag import BagLimits  # noqa: PLC0415  # it imports protobuf: not for -version

    sessions = config[SessionsConfig]
    return BagLimits(
        entries=sessions.bag_max_entries,
        key_bytes=sessions.bag_max_key_bytes,
        value_bytes=sessions.bag_max_value_bytes,
    )
