"""An RPC as a router sees it, and the router of a node without peers.

How a request becomes a use case has three forms, and the router chooses:

    form             | chosen when                                        | differs in
    -----------------+----------------------------------------------------+-----------------------------------
    handle           | this node owns the token, or no token is concerned | may use and fill the caches
    handle_uncached  | another node owns the token, but this node handles | reads from the storage and leaves
                     | the call, and no other node has begun it           | no copy here
    retry            | another node, or this node's own storage while it  | as handle_uncached, and accepts
                     | ended, was asked, and its outcome is unknown       | that the work may be done already

Why no copy in the second form: a write goes to the token's owner, which tells this node nothing. A copy here
would stay as it is until it expires.

What "done already" means depends on the RPC:

- Get, Exists: reads have no effect that counts, so a retry is `handle_uncached`.
- Start: if the token is in use by a session with the same content, that is this call's own session.
- Abandon: a session that is not found was ended by the first try, so the retry succeeds.
- SetValue: setting the same value twice is setting it once.
- List: a read too.
- Delete: one that is repeated counts only what is left. It does not find what the first try has ended, and so
  has every node drop every copy, unless it names its session.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from google.protobuf.message import Message

from aio.later import Later
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.token import TOKEN_ENTROPY_BYTES, generate_token
from mnemosyned.transport.call import Call, Encoded

# A serialized response: at once where a cache has it; by a Later where it comes with a batch, of the storage
# or from another node; otherwise by a coroutine. The first two save a task and the time-out around it.
Response: TypeAlias = Encoded | Later[Encoded] | Coroutine[Any, Any, Encoded]
Handle: TypeAlias = Callable[[SessionService, Any, Call], Response]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """One RPC, from a parsed request to a serialized response; a router decides where it is handled.

    `token` reads the token whose owner should handle the call. An RPC without one is handled where it
    arrives. `mirrored` answers from this node's mirror of the owner's copy, which came with the answer to an
    RPC that `returns_session`. `is_write` tells the router that a repeated try must wait until the first
    cannot be done any more. The three forms of handling are explained at the top of this module.
    """

    name: str
    request_type: Callable[[], Message]
    handle: Handle
    handle_uncached: Handle
    retry: Handle
    token: Callable[[Any], str] | None = None
    mirrored: Callable[[SessionService, str, EncodedSession], Encoded] | None = None
    returns_session: bool = False
    is_write: bool = False


class Router(Protocol):
    """Decides where a call is handled."""

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """Handle the call on this node or on another one.

        Raises:
            MnemosyneError: at once, or by the coroutine; `transport/status.py` has its gRPC status.
        """
        ...

    def new_token(self) -> str:
        """Return a token for a session that is to be started, if possible one of this node's own."""
        ...


class Gate(Protocol):
    """Tells whether copies may be served and kept."""

    def is_open(self) -> bool:
        """Tell it of a call that arrives now."""
        ...

    def refuse_ring(self) -> None:
        """Count a call that no copy may answer, since this node does not own its token by all rings."""
        ...


class LocalRouter:
    """The router of a node without peers: its own service handles every call."""

    def __init__(self, service: SessionService, gate: Gate | None = None) -> None:
        """Without a gate, copies may always be served: nobody else has the storage."""
        self._service = service
        self._gate = gate

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        if self._gate is None or self._gate.is_open():
            return rpc.handle(self._service, request, call)
        return rpc.handle_uncached(self._service, request, call)

    def new_token(self) -> str:
        """See Router."""
        return new_token()


def new_token() -> str:
    """Return a token that nobody can guess."""
    return generate_token(os.urandom(TOKEN_ENTROPY_BYTES))
