"""Calls that come while the daemon starts: they wait.

The daemon listens before it has its storage, and a balancer that looks at ports alone sends calls to a node
that listens. A storage that can be reached is open a moment later, so these calls need not fail. Once the
first try has failed they do: a storage that is away may be away for hours.

In a cluster they wait until the node has joined. Before that it knows no way to the others, and a write would
have to bar them all (cluster/lease.py, 9): they would drop all their copies whenever a node is restarted.

A call waits before it is handled, and not in the storage. Only when the storage is open is its clock known,
and so until when a write may be done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

from google.protobuf.message import Message

from mnemosyned.api.rpc import Response, Router, Rpc
from mnemosyned.transport.call import Call, Encoded

# As long as a connection may take by default. Callers have deadlines of their own.
_LONGEST_S: Final = 2.0

_Handle: TypeAlias = Callable[[Rpc, Message, Call], Response]


class OpeningRouter:
    """A router in front of a router, which has calls wait from `hold` to `release`, 2 s at most."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._is_over = asyncio.Event()
        self.new_token = router.new_token
        # Replaced, and not asked each time: for the life of the daemon nothing is in front of the router.
        self.handle: _Handle = router.handle

    def hold(self) -> None:
        """Have calls wait from now on."""
        self.handle = self._wait_and_handle

    def release(self) -> None:
        """Have those that wait handled, and others at once."""
        self.handle = self._router.handle
        self._is_over.set()

    async def _wait_and_handle(self, rpc: Rpc, request: Message, call: Call) -> Encoded:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_S):
                await self._is_over.wait()
        response = self._router.handle(rpc, request, call)
        return response if isinstance(response, bytes | tuple) else await response
