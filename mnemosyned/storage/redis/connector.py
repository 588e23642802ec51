"""Opens connections to the primary of an address.

With Sentinels, they are asked for each connection, one after the other, the one that answered last first. A
Sentinel may be wrong for a moment. If it names a replica, the server refuses every script there is
(`scripts.py`), and the next connection asks again. If it names a primary that is cut off from its replicas,
`-redis.wait` keeps this daemon from believing it (`pool.py`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from mnemosyned.storage.redis.address import Address
from mnemosyned.storage.redis.faults import FAULTS, NoPrimary, UnknownService, name_of
from mnemosyned.storage.redis.link import Link, open_link


class Connector:
    """Opens connections for one address, each within the same time."""

    def __init__(self, address: Address, *, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._sentinels = list(address.hosts)

    async def connect(self) -> Link:
        """Open a connection to the primary, and log in.

        Raises:
            NoPrimary: no Sentinel answers.
            UnknownService: a Sentinel does not know the service.
            redis-py's errors, OSError, TimeoutError: of the server.
        """
        address = self.address
        async with asyncio.timeout(self._timeout_s):
            host = await self.primary()
            return await open_link(address, host, address.login, address.database)

    async def primary(self) -> tuple[str, int] | None:
        """Return where the primary is; None: at the socket of the address. Raises like `connect`."""
        if not self.address.hosts:
            return None
        if not self.address.service:
            return self.address.hosts[0]
        failures: list[str] = []
        for sentinel in list(self._sentinels):
            try:
                async with asyncio.timeout(self._timeout_s / len(self._sentinels)):
                    answer = await self._ask(sentinel)
            except FAULTS as exc:
                failures.append(f"{sentinel[0]}:{sentinel[1]}: {name_of(exc)}")
                continue
            if isinstance(answer, BaseException):
                failures.append(f"{sentinel[0]}:{sentinel[1]}: {name_of(answer)}")
                continue
            if answer is None:
                raise UnknownService(f"no Sentinel knows the service {self.address.service}")
            try:
                host, port = answer
                primary = host.decode(), int(port)
            except (AttributeError, TypeError, ValueError):
                # Another program, or a server that is no Sentinel.
                failures.append(f"{sentinel[0]}:{sentinel[1]}: no valid answer")
                continue
            self._sentinels.remove(sentinel)
            self._sentinels.insert(0, sentinel)
            return primary
        failure = NoPrimary("no Sentinel names the primary")
        failure.add_note("; ".join(failures))
        raise failure

    async def _ask(self, sentinel: tuple[str, int]) -> Any:  # noqa: ANN401  # as the reply has it
        address = self.address
        link = await open_link(address, sentinel, address.sentinel_login, 0)
        try:
            (answer,) = await link.call([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)])
        finally:
            with suppress(*FAULTS):
                await link.close()
        return answer
