"""What a caller's address is worth: which part of it names one caller.

- A port names a connection, and an attacker has as many ports as it likes. It does not count.
- The lower half of an IPv6 address does not count either. A host usually gets a network of 2**64 addresses,
  and chooses among them.

A proxy or a balancer hides the addresses of its clients, so that all of them are one caller. The PROXY
protocol and `x-forwarded-for` tell more, but only where the proxy is trusted. This daemon does not read them.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from typing import Final

UNIX: Final = "unix"
_UNKNOWN: Final = "unknown"
_NETWORK_BYTES: Final = 8
_MAPPED: Final = bytes(10) + b"\xff\xff"  # before an IPv4 address in the form of IPv6


# A connection makes many calls, and reading IPv6 takes 1.2 µs.
@lru_cache(maxsize=1024)
def network_of(peer: str) -> str:
    """Return an IPv4 address, an IPv6 network of 64 bits, or `unix`; without the port.

    `peer` is an address as one of the engines gives it: 192.0.2.1:80, [2001:db8::1]:80, %5B2001:db8::1%5D:80,
    unix, unix:/path. All addresses that are in no such form are one caller.
    """
    host = peer.rpartition(":")[0]
    if ":" not in host and "." in host:
        return host
    if peer.startswith(UNIX):
        return UNIX
    return _network6_of(host)


def _network6_of(host: str) -> str:
    # What follows another % is the zone of a link-local address.
    bare = host.replace("%5B", "").replace("%5D", "").strip("[]").partition("%")[0]
    try:
        packed = socket.inet_pton(socket.AF_INET6, bare)
    except OSError:
        return _UNKNOWN
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[len(_MAPPED) :])
    network = packed[:_NETWORK_BYTES] + bytes(len(packed) - _NETWORK_BYTES)
    return f"{socket.inet_ntop(socket.AF_INET6, network)}/64"
