"""Signs that the process of a member may have ended, and the dial that finds out more.

    a connection that is held was lost ─────┐
    a packet was not delivered (gossip.py) ─┼─> probe() ─> dial ─┬─> refused: its host is up, its process not
    a forwarded call failed (forward.py) ───┘                    └─> connected, or no answer

A refusal is evidence against the member. Otherwise the core (swim.py) probes it soon, and decides by that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aio.tasks import Tasks
    from cluster.member import Member
    from cluster.peers import Peers
    from cluster.swim import Swim

# Members to which a connection is held. In a larger cluster the rest are found out by probes alone.
MAX_CONNECTED: Final = 64
# Within one network a reset takes milliseconds.
_DIAL_TIMEOUT_S: Final = 0.2
# Between two dials of one member: a process that ends may close its port later than its connections.
_DIAL_PAUSE_S: Final = 0.25


class FailureSigns:
    """The connections that are held because their loss is a sign, and the dials after a sign."""

    def __init__(self, swim: Swim, peers: Peers, tasks: Tasks, *, perform: Callable[[], None]) -> None:
        """Hold no connection yet; `tasks` own the connections and the dials, and end them.

        `perform` is called after each touch of the core, and does what the core has ordered.
        """
        self._swim = swim
        self._peers = peers
        self._tasks = tasks
        self._perform = perform
        self._connections: dict[str, tuple[Member, asyncio.Task[None]]] = {}  # by name
        self._dials: dict[str, bool] = {}  # by name, while under way: whether another dial is due

    def keep_connected(self, members: Sequence[Member]) -> None:
        """Hold a connection to each member: its loss is the first sign that a process ended."""
        wanted = {member.name: member for member in members[:MAX_CONNECTED]}
        for name, (former, task) in list(self._connections.items()):
            member = wanted.get(name)
            if member is None or member.instance != former.instance or member.address != former.address:
                del self._connections[name]
                task.cancel()
                # Another process listens there now, perhaps on another host of that name.
                self._peers.forget(former.address)
        for name, member in wanted.items():
            if name not in self._connections:
                connecting = self._peers.keep_connected(member.address, partial(self.probe, name))
                # Without a task, beyond the bound, only probes find out that the member has died.
                started = self._tasks.spawn(connecting)
                if started is not None:
                    self._connections[name] = (member, started)

    def probe(self, name: str) -> None:
        """Dial a member after a sign, unless that is under way: then the sign leads to one more dial."""
        if name in self._dials:
            # The port may have been open at the dial under way and be closed now.
            self._dials[name] = True
        elif self._tasks.spawn(self._dial(name)):
            self._dials[name] = False

    async def _dial(self, name: str) -> None:
        """Dial a member, and once more after a pause if there was another sign meanwhile."""
        try:
            while (member := self._swim.table.get(name)) is not None and not member.is_gone:
                self._dials[name] = False
                refused = await is_refused(member.address, self._peers.socket_at(member.address))
                now = time.monotonic()
                if refused:
                    self._swim.refused(name, now=now)
                else:
                    self._swim.dropped(name, now=now)
                self._perform()
                await asyncio.sleep(_DIAL_PAUSE_S)
                if not self._dials[name]:
                    return
        finally:
            del self._dials[name]


async def is_refused(address: str, unix_path: str = "") -> bool:
    """Dial an address, or a socket on this host; tell whether the host says that no process listens there.

    A host that is down, or a network that drops packets, gives no answer. That proves nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            if unix_path:
                _, writer = await asyncio.open_unix_connection(unix_path)
            else:
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
