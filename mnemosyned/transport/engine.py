"""The engine port: something that serves a method table as gRPC over HTTP/2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from mnemosyned.security.tls import TlsFiles, TlsMaterial

# Metadata beyond this is refused; a token of 4,096 bytes travels in it.
MAX_METADATA_BYTES: Final = 32 * 1024


class ListenFailed(Exception):
    """The address cannot be listened on; the text is for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What both engines need."""

    host: str
    port: int  # 0: any free port
    max_message_bytes: int
    max_streams: int  # of a connection at once; more wait at the client
    max_connections: int  # more wait for one to end, or are closed
    drain_timeout_s: float
    log_as_json: bool = False  # the engine's own lines on stderr
    tls: TlsFiles | None = None  # they have been read once, and were good

    @property
    def address(self) -> str:
        """What to listen on."""
        return host_port(self.host, self.port)


def host_port(host: str, port: int) -> str:
    """Join a host and a port, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Engine(Protocol):
    """A gRPC server; used once, from `start` to `drain`."""

    async def start(self) -> int:
        """Listen; return the port.

        Raises:
            ListenFailed: the address is taken or not ours, or the TLS files are no good.
        """
        ...

    async def reload_tls(self, material: TlsMaterial) -> None:
        """Serve new connections with what the TLS files hold now; calls in flight have the time of a drain.

        Raises:
            FilesUnusable: the files have changed again meanwhile, and are no good.
        """
        ...

    async def drain(self) -> None:
        """Refuse new calls, let those in flight finish, cancel what is left after `drain_timeout_s`."""
        ...
