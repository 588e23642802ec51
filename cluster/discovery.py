"""Seeds to addresses: one name may stand for many nodes, and for different ones tomorrow.

In Kubernetes, the name of a headless service resolves to every pod behind it. Names are resolved before each
round of asking (gossip.py), so that a node which starts before its peers finds them when they come.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Final

log = logging.getLogger(__name__)

_RESOLVE_TIMEOUT_S: Final = 2.0
# More need not be asked: any node that answers knows all members.
_MAX_ADDRESSES: Final = 64


class Seeds:
    """The seeds of one node: which of them lead to other nodes, and to which addresses."""

    def __init__(self, names: Sequence[str], *, own: Iterable[str]) -> None:
        """Resolve none yet; `own` are the names and addresses that are known to lead to this node."""
        self.names = names
        self._own = set(own)
        self._by_address: dict[str, str] = {}

    def foreign(self) -> list[str]:
        """Return the seeds that are not known to lead to this node."""
        # The seeds may name this node too, so that all nodes can have the same settings.
        return [seed for seed in self.names if seed not in self._own]

    async def find(self) -> list[str]:
        """Return the addresses that these seeds stand for now."""
        self._by_address = await addresses(self.foreign())
        return list(self._by_address)

    def leads_back(self, address: str) -> None:
        """Take note that this node itself is at this address."""
        self._own.add(address)

    def is_own(self, address: str) -> bool:
        """Tell whether this node itself is known to be at this address."""
        return address in self._own

    def at(self, address: str) -> str:
        """Return the seed that stands for an address, or else the address itself."""
        return self._by_address.get(address, address)


async def addresses(seeds: Sequence[str]) -> dict[str, str]:
    """Return each address that the seeds stand for, with its seed.

    A name that does not resolve yet has no address, and is no error: its node may not have started.
    """
    found: dict[str, str] = {}
    for seed, resolved in zip(seeds, await asyncio.gather(*map(_resolve, seeds)), strict=True):
        for address in resolved:
            found.setdefault(address, seed)
    return dict(list(found.items())[:_MAX_ADDRESSES])


async def own_address(listen: str) -> str:
    """Return where peers find this node: its name resolved, unless only this host could use that.

    After a restart at another address, the resolvers of the peers may give the former address for a while. An
    address that this node announces itself is right at once. A loopback address is right on this host alone,
    so the name is announced instead.
    """
    resolved = await _resolve(listen)
    if not resolved or ip_address(resolved[0].rpartition(":")[0].strip("[]")).is_loopback:
        return listen
    return resolved[0]


async def _resolve(seed: str) -> list[str]:
    host, _, port = seed.rpartition(":")
    host = host.strip("[]")
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as exc:
        # A name that cannot be one, such as a..b, is a UnicodeError.
        log.debug("seed_unresolved", extra={"seed": seed, "error": str(exc)})
        return []
    return [_joined(str(address[0]), int(port)) for *_, address in found]


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
