"""Which addresses may be a node's. Pure.

A node dials what other nodes name. Without rules, a claim could make it dial the metadata service of a cloud,
which gives credentials to whoever asks from the right host, or a router on its own link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

MAX_NAME: Final = 260  # of a host name, 253, and a port
_MAX_PORT: Final = 65_535
# A host name, an IPv4 address, or an IPv6 address in brackets; then a port.
_ADDRESS: Final = re.compile(
    r"(?:[0-9A-Za-z_](?:[0-9A-Za-z._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})"
)

# AWS (also for containers), Alibaba Cloud, and AWS over IPv6; Google and Azure use the first one.
_METADATA: Final = frozenset(
    map(
        ip_address, ("169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "fd00:ec2::254")
    )
)
_LINKS: Final = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))

Address = IPv4Address | IPv6Address


def is_address(text: str) -> bool:
    """Tell whether a text is host:port, in printable ASCII and of a length that a host may have."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and len(text) <= MAX_NAME and 0 < int(match[1]) <= _MAX_PORT


class AddressRules:
    """What may be dialled, by what the settings name: seeds may be where nothing else may be."""

    def __init__(self, known: Iterable[str], *, own: str) -> None:
        """`known` are seeds, as host:port; `own` is where this node itself is dialled."""
        self._own = own
        self._known: set[str] = set()
        self._links: list[IPv4Network | IPv6Network] = []
        self.know((*known, own))

    def know(self, addresses: Iterable[str]) -> None:
        """Take these too as what the settings name: what the names of seeds stand for now."""
        hosts = set(map(_host, addresses)) - self._known
        self._known |= hosts
        ips = [ip for ip in map(_ip, hosts) if ip is not None]
        self._links += [
            link for link in _LINKS if link not in self._links and any(_is_within(ip, link) for ip in ips)
        ]

    def may_be_node(self, address: str) -> bool:
        """Tell whether another node may be at host:port. A name is looked at again when it is resolved."""
        return address != self._own and self.may_dial(_host(address))

    def may_dial(self, host: str) -> bool:
        """Tell whether a node may be at a host.

        - A host that a setting names: yes.
        - Link-local: if a setting names one on such a network, and it is not a metadata service.
        - Unspecified, multicast and reserved addresses: no.
        """
        if host in self._known:
            return True
        ip = _ip(host)
        if ip is None:
            return True
        if ip in _METADATA or ip.is_unspecified or ip.is_multicast or ip == IPv4Address("255.255.255.255"):
            return False
        return not ip.is_link_local or any(_is_within(ip, link) for link in self._links)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _ip(host: str) -> Address | None:
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _is_within(ip: Address, network: IPv4Network | IPv6Network) -> bool:
    return ip.version == network.version and ip in network
