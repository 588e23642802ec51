"""From a configuration to the options of the daemon's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mnemosyned.security.tls import ClientAuth, TlsFiles
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.service import Lifetimes
from mnemosyned.transport.engine import EngineOptions

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

_US_PER_S: Final = 1_000_000


def lifetimes(config: Config) -> Lifetimes:
    """Return how long sessions, copies and unwritten expiries last."""
    return Lifetimes(
        session_us=int(config.ttl_s * _US_PER_S),
        cache_us=int(config.cache_ttl_s * _US_PER_S),
        touch_interval_us=int(config.touch_interval_s * _US_PER_S),
    )


def bag_limits(config: Config) -> BagLimits:
    """Return what a bag may hold."""
    return BagLimits(
        entries=config.bag_max_entries,
        key_bytes=config.bag_max_key_bytes,
        value_bytes=config.bag_max_value_bytes,
    )


def engine_options(config: Config) -> EngineOptions:
    """Return what both engines need."""
    return EngineOptions(
        host=config.host,
        port=config.port,
        max_message_bytes=config.grpc_max_message_bytes,
        max_streams=config.grpc_max_streams,
        max_connections=config.grpc_max_connections,
        drain_timeout_s=config.drain_timeout_s,
        log_as_json=config.log_environment != "development",
        tls=tls_files(config) if config.tls else None,
    )


def tls_files(config: Config) -> TlsFiles:
    """Return the files of TLS; they mean something only with `-tls`."""
    return TlsFiles(
        certificate=config.tls_crt,
        private_key=config.tls_key,
        authorities=config.tls_ca,
        client_auth=ClientAuth(config.tls_client_auth),
    )
