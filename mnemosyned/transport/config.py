"""The settings of the gRPC port, and how it closes.

Every limit here bounds memory that a client could otherwise fill: the size of a request, the calls of one
connection, the number of connections, the time for which answers wait. `-auth.keys` and TLS keep out those
that mean harm.

After SIGTERM a call has `-drain.delay` to arrive and then `-drain.timeout` to finish. Kubernetes kills a pod
after its grace period, 30 s by default: the sum of both must be less, with 5 s for the last writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import boolean, duration, host, integer, one_of, optional_node_address, size
from mnemosyned.security.config import TlsConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcConfig(Section):
    """Where calls arrive, how many, and how the port closes."""

    TITLE = "Ports and calls"
    EXAMPLE = "mnemosyned -host=0.0.0.0 -port=8080"

    host: str = setting(
        "host", "127.0.0.1", host, "host name or address to listen on, or unix:/path; :: is all addresses"
    )
    port: int = setting(
        "port",
        "8080",
        integer(0, 65534),
        "gRPC port; the admin port (HTTP) is the next one; 0: any two free ports",
    )
    advertise: str = setting(
        "grpc.advertise",
        "",
        optional_node_address,
        "this node's gRPC port as clients dial it, host:port: told to those that ask for a token's owner",
    )
    engine: str = setting(
        "grpc.engine",
        "h2",
        one_of("h2", "grpcio"),
        "gRPC engine: h2 (fast), or grpcio (the reference, for comparison)",
    )
    max_message_bytes: int = setting(
        "grpc.max-message", "4MiB", size(1024, 64 * 1024**2), "largest request, in bytes, KiB or MiB"
    )
    max_streams: int = setting(
        "grpc.max-streams",
        "1024",
        integer(1, 2**31 - 1),
        "calls in flight on one connection (h2: at most 128); further calls wait at the client",
    )
    max_connections: int = setting(
        "grpc.max-connections",
        "10000",
        integer(1, 2**31 - 1),
        "connections of clients and peers; further ones are closed at once",
    )
    max_connections_per_address: int = setting(
        "grpc.max-connections-per-address",
        "0",
        integer(0, 2**31 - 1),
        "connections from one address, with h2; 0: no limit of their own, as behind a balancer",
    )
    handshake_timeout_s: float = setting(
        "grpc.handshake-timeout",
        "10s",
        duration(1),
        "time in which a new connection must finish TLS and begin HTTP/2",
    )
    max_age_s: float = setting(
        "grpc.max-age",
        "1h",
        duration(0),
        "age at which a client is asked to connect again, give or take a tenth; 0: never",
    )
    max_connection_age_s: float = setting(
        "grpc.max-connection-age", "1h", duration(0), "another name of -grpc.max-age"
    )
    age_grace_s: float = setting(
        "grpc.max-age-grace",
        "10s",
        duration(0),
        "after -grpc.max-age, time for calls in flight to finish; streams end with UNAVAILABLE",
    )
    max_idle_s: float = setting(
        "grpc.max-idle",
        "10m",
        duration(0),
        "time without a call after which a client is asked to connect again; 0: no limit",
    )
    send_timeout_s: float = setting(
        "grpc.send-timeout",
        "20s",
        duration(1),
        "time after which a connection is closed whose client takes none of its answers",
    )
    max_unsent_bytes: int = setting(
        "grpc.max-unsent",
        "128MiB",
        size(1024**2, 1024**4),
        "answers that clients have not read, of all connections; beyond it the stillest client is closed",
    )
    max_unsent_bytes_per_connection: int = setting(
        "grpc.max-unsent-per-connection",
        "1MiB",
        size(64 * 1024, 1024**3),
        "answers that a client has not read, beyond which its further requests wait",
    )
    max_request_bytes: int = setting(
        "grpc.max-incomplete",
        "128MiB",
        size(1024**2, 1024**4),
        "requests that are not complete, of all connections, with h2; beyond it the oldest is closed",
    )
    max_request_bytes_per_connection: int = setting(
        "grpc.max-incomplete-per-connection",
        "64MiB",
        size(64 * 1024, 1024**3),
        "requests of a connection that are not complete, with h2; further ones are refused",
    )
    max_watches: int = setting(
        "grpc.max-watches",
        "10000",
        integer(1, 2**31 - 1),
        "streams of Health.Watch; further ones are refused",
    )
    max_watches_per_connection: int = setting(
        "grpc.max-watches-per-connection",
        "16",
        integer(1, 2**31 - 1),
        "streams of Health.Watch on one connection; further ones are refused",
    )
    health_stall_s: float = setting(
        "health.stall",
        "10s",
        duration(1),
        "silence of the event loop, or of the gRPC port, after which /healthz fails, for a restart",
    )
    is_debug: bool = setting("grpc.debug", "false", boolean, "log details of every gRPC call and connection")
    drain_delay_s: float = setting(
        "drain.delay",
        "200ms",
        duration(0),
        "after SIGTERM, time in which new calls are still accepted, so that balancers see NOT_SERVING",
    )
    drain_timeout_s: float = setting(
        "drain.timeout", "10s", duration(0), "after -drain.delay, time for calls in flight to finish"
    )

    def resolved(self, sources: Mapping[str, str]) -> Self:
        """See Section: the age has two names."""
        other = sources.get("grpc.max-connection-age")
        if other is None:
            return replace(self, max_connection_age_s=self.max_age_s)
        if "grpc.max-age" in sources:
            raise ConfigError(f"{other}: -grpc.max-age is given as well, which is the same")
        return replace(self, max_age_s=self.max_connection_age_s)

    def check(self, config: Config) -> None:
        """See Section."""
        if self.engine == "grpcio" and config[TlsConfig].client_auth == "optional":
            raise ConfigError("flag -tls.client-auth: -grpc.engine=grpcio knows none and require only")
