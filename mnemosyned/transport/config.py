"""The settings of the gRPC port, and how it closes.

Every limit here bounds memory that a client could otherwise fill: the size of a request, the calls of one
connection, the number of connections, the time for which answers wait. `-auth.keys` and TLS keep out those
that mean harm.

After SIGTERM a call has `-drain.delay` to arrive and then `-drain.timeout` to finish. Kubernetes kills a pod
after its grace period, 30 s by default: the sum of both must be less, with 5 s for the last writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import boolean, duration, host, integer, one_of, size
from mnemosyned.security.config import TlsConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcConfig(Section):
    """Where calls arrive, how many, and how the port closes."""

    TITLE = "Ports and calls"
    EXAMPLE = "mnemosyned -host=0.0.0.0 -port=8080"

    host: str = setting("host", "127.0.0.1", host, "host name or address to listen on, or unix:/path")
    port: int = setting(
        "port",
        "8080",
        integer(0, 65534),
        "gRPC port; the admin port (HTTP) is the next one; 0: any two free ports",
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
        "age at which h2 asks a client to connect again, give or take a tenth; 0: never",
    )
    send_timeout_s: float = setting(
        "grpc.send-timeout",
        "20s",
        duration(1),
        "time after which h2 closes a connection whose client takes none of its answers",
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

    def check(self, config: Config) -> None:
        """See Section."""
        if self.engine == "grpcio" and config[TlsConfig].client_auth == "optional":
            raise ConfigError("flag -tls.client-auth: -grpc.engine=grpcio knows none and require only")
