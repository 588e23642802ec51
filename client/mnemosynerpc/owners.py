"""Get sessions where they are owned: one hop less in a cluster than through a balancer alone.

    get(token) ── owner known? ── yes ──> the owner ── a session ──> response
         |            no                     | a failure, or no answer within half of the time
         └────────────┴──────────────────────┴──> the balancer ──> response

Each call asks by metadata for the public address of its token's owner, and the answer's trailer says it
(`-grpc.advertise` of the node; without that there is no trailer, and each call goes by the balancer). The
owners are remembered for the tokens that were used last. What is remembered may be wrong after the ring has
changed: then the former owner answers all the same, by a hop, and its trailer says where to go next.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeVar

import grpc

from mnemosynerpc.session_pb2 import GetRequest, GetResponse
from mnemosynerpc.session_pb2_grpc import SessionManagerStub

T = TypeVar("T")

OWNER_KEY: Final = "mnemosyned-owner"
_METADATA: Final = ((OWNER_KEY, "wanted"),)
_OWNERS_SHARE: Final = 0.5  # of a call's time, before the balancer is asked
_PAUSE_S: Final = 2.0  # in which an owner that did not answer is not asked; the ring changes meanwhile
_UNANSWERED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class OwnerReader:
    """Reads sessions at their owners, else by the balancer. For one thread; `close` it at the end."""

    def __init__(
        self,
        balancer: grpc.Channel,
        *,
        dial: Callable[[str], grpc.Channel] = grpc.insecure_channel,
        max_tokens: int = 10_000,
        max_owners: int = 64,
    ) -> None:
        """`dial` opens a channel to an owner, with the credentials that the balancer's channel has."""
        self._balanced = SessionManagerStub(balancer)
        self._dial = dial
        self._max_tokens = max_tokens
        self._max_owners = max_owners
        self._owner_by_token: OrderedDict[str, str] = OrderedDict()  # the one used last at the end
        self._channel_by_owner: OrderedDict[str, grpc.Channel] = OrderedDict()
        self._paused_until_s: OrderedDict[str, float] = OrderedDict()  # by owner
        self.at_owners = 0  # calls that an owner answered without the balancer

    def get(self, token: str, *, timeout_s: float = 3.0) -> GetResponse:
        """Return the session. Raises grpc.RpcError."""
        end_s = time.monotonic() + timeout_s
        owner = self._owner_by_token.get(token)
        if owner is not None and time.monotonic() >= self._paused_until_s.get(owner, 0.0):
            self._owner_by_token.move_to_end(token)
            try:
                response = self._ask(self._stub(owner), token, timeout_s * _OWNERS_SHARE)
            except grpc.RpcError as error:
                del self._owner_by_token[token]
                if error.code() in _UNANSWERED:
                    self._pause(owner)
            else:
                self.at_owners += 1
                return response
        return self._ask(self._balanced, token, end_s - time.monotonic())

    def close(self) -> None:
        """Close the channels to owners; the balancer's is the caller's."""
        for channel in self._channel_by_owner.values():
            channel.close()
        self._channel_by_owner.clear()

    def _ask(self, stub: SessionManagerStub, token: str, timeout_s: float) -> GetResponse:
        request = GetRequest(access_token=token)
        response, call = stub.Get.with_call(request, timeout=timeout_s, metadata=_METADATA)
        for key, value in call.trailing_metadata() or ():
            if key == OWNER_KEY:
                _put(self._owner_by_token, token, str(value), self._max_tokens)
        return response

    def _stub(self, owner: str) -> SessionManagerStub:
        channel = self._channel_by_owner.get(owner) or self._dial(owner)
        if (oldest := _put(self._channel_by_owner, owner, channel, self._max_owners)) is not None:
            oldest.close()
        return SessionManagerStub(channel)

    def _pause(self, owner: str) -> None:
        _put(self._paused_until_s, owner, time.monotonic() + _PAUSE_S, self._max_owners)
        self._channel_by_owner.pop(owner).close()


def _put(entries: OrderedDict[str, T], key: str, value: T, most: int) -> T | None:
    """Make this the entry used last; return the one used first, if it had to go."""
    entries[key] = value
    entries.move_to_end(key)
    return entries.popitem(last=False)[1] if len(entries) > most else None
