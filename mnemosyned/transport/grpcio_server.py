"""grpcio's server, told apart from the paths that strangers send.

grpcio reads the path of a call as UTF-8, in the one loop that takes calls in. A path that is not UTF-8 ends
this loop, and with it the server: one packet would stop the node. So this loop never sees a path of a client:

    path ── one of ours, byte for byte ──> grpcio's core ──> the loop, which knows our path ──> handler
      └──── any other ───────────────────> grpcio's core ──> `_refuse_all`, which never asks for it

Our methods are registered with the core, which compares bytes. What it does not find is no method of ours, so
`_request_call` need not know its path to refuse it. A path is neither logged nor sent back, since it may
contain a token.

The classes below use names of grpcio that are not public. tests/contract/test_paths.py fails if a release of
grpcio has others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import grpc
from grpc._cython import cygrpc
from grpc.aio._server import Server

from aio.tasks import Tasks

Context = Any
Handlers = dict[str, "grpc.RpcMethodHandler[Any, Any]"]
Refuse = Callable[[Context], Awaitable[None]]

# Further ones are cancelled without a status.
_MAX_REFUSALS: Final = 1000


class RegisteredServer(Server):
    """A server of grpc.aio that has registered methods only."""

    def __init__(self, options: Sequence[tuple[str, Any]], handlers: Handlers, refuse: Refuse) -> None:
        """`handlers` by path; `refuse` aborts a call to anything else."""
        # Not the constructor of the base, which makes a core of its own.
        self._loop = cygrpc.get_working_loop()
        self._server = core = _Core(self._loop, None, (), (), tuple(options), None)
        core.refuse_by(refuse, self._loop)
        core.add_registered_method_handlers(handlers)

    async def close_refusals(self) -> None:
        """Cancel the refusals that are under way."""
        await self._server.refusals.close()


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # no stubs
    def refuse_by(self, refuse: Refuse, loop: Any) -> None:  # noqa: ANN401  # of any kind
        self._refuse = refuse
        self._refusal_loop = loop
        self.refusals = Tasks("refusal", max_tasks=_MAX_REFUSALS)

    async def _request_call(self) -> NoReturn:
        # grpcio awaits the next call to an unregistered path, and would read its path. It waits in vain until
        # the shutdown, which raises here.
        while True:
            state = await super()._request_call()
            context = cygrpc._ServicerContext(state, None, None, self._refusal_loop)  # noqa: SLF001  # see above
            self.refusals.spawn(self._refused(context))

    async def _refused(self, context: Context) -> None:
        try:
            await self._refuse(context)
        except (grpc.aio.AbortError, cygrpc.ExecuteBatchError):
            # The first is how `abort` ends; with the second, the client is gone.
            return
