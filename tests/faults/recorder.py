"""Concurrent clients that call chosen nodes, and the record of what they did and saw.

The clients believe what they were answered, and choose by it: sessions are started, read, changed, ended,
started again, and replaced by others. They do not judge: two clients may work on one session at once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import grpc
from faults.history import ENDS, READS, Kind, Operation, Outcome
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from secrecy import CANARY

KEYS: Final = ("a", "b")
# The key that the last calls of a run set, to see the rest of the bag as the storage has it.
_LAST_KEY: Final = "last"
_TIMEOUTS_S: Final = (1.0, 2.0, 3.0)
_READS: Final = (1, 1, 1, 6)
_MOST_IN_FLIGHT: Final = 300
# A session has this many lives, and another one takes its place.
_LIVES: Final = 2
_LAST_TIMEOUT_S: Final = 10.0
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
)
# What gRPC says of a call that found no connection, and was never sent.
_UNSENT: Final = "failed to connect to all addresses"
_OUTCOME_BY_CODE: Final = {
    grpc.StatusCode.NOT_FOUND: Outcome.ABSENT,
    grpc.StatusCode.ALREADY_EXISTS: Outcome.TAKEN,
}


@dataclass(slots=True)
class _Token:
    """What the clients believe of a session."""

    name: str
    is_live: bool = False
    lives: int = 0
    writers: int = 0


class Recorder:
    """Calls at a steady rate while it is entered; `operations` is the history."""

    def __init__(
        self,
        *,
        seed: int,
        rate: float,
        tokens: int = 30,
        avoided: Collection[str] = frozenset(),
        timeouts_s: Sequence[float] = _TIMEOUTS_S,
    ) -> None:
        """Call no node while it is in `avoided`, which may change; each call has one of `timeouts_s`."""
        self.operations: list[Operation] = []
        self._rng = random.Random(seed)
        self._rate = rate
        self._avoided = avoided
        self._timeouts_s = timeouts_s
        self._values = itertools.count(1)
        self._names = (f"{CANARY}-{seed}-{number}" for number in itertools.count())
        self._tokens = [_Token(next(self._names)) for _ in range(tokens)]
        self._retired: list[_Token] = []
        self._stubs: dict[str, Any] = {}
        self._channels: list[grpc.aio.Channel] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, node: str, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        """Call this node too."""
        if credentials is None:
            channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._channels.append(channel)
        self._stubs[node] = SessionManagerStub(channel)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for channel in self._channels:
            await channel.close()

    async def stop(self) -> None:
        """Begin no more calls, and wait for those under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def look_at_all(self, nodes: Sequence[str]) -> None:
        """Ask the storage for every session of the run, and then each of these nodes."""
        limit = asyncio.Semaphore(16)

        async def look(token: _Token) -> None:
            async with limit:
                await self._call(nodes[0], token, Kind.SET, {_LAST_KEY: next(self._values)}, _LAST_TIMEOUT_S)
                for node in nodes:
                    await self._call(node, token, Kind.GET, {}, _LAST_TIMEOUT_S)

        await asyncio.gather(*(look(token) for token in (*self._retired, *self._tokens)))

    async def _run(self) -> None:
        # The calls are not the task's own: a cancelled call would have no record.
        calls: set[asyncio.Task[None]] = set()
        due_s = time.monotonic()
        try:
            while True:
                due_s = max(due_s + 1 / self._rate, time.monotonic() - 1.0)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                if len(calls) < _MOST_IN_FLIGHT:
                    call = asyncio.create_task(self._step())
                    calls.add(call)
                    call.add_done_callback(calls.discard)
        finally:
            await asyncio.gather(*calls)

    async def _step(self) -> None:
        rng = self._rng
        # One in ten also takes a session that another client writes to.
        nodes = self._nodes()
        free = [token for token in self._tokens if not token.writers or rng.random() < 0.1]
        if not free or not nodes:
            return
        token, node = rng.choice(free), rng.choice(nodes)
        kind = self._kind(token)
        if kind in READS:
            # The calls of retired sessions are reads alone.
            await self._read(node, self._read_token(token), kind)
            return
        token.writers += 1
        try:
            one = await self._call(node, token, kind, self._written(kind), rng.choice(self._timeouts_s))
        finally:
            token.writers -= 1
        self._learn(token, one)
        if one.outcome is Outcome.DONE:
            await self._look_elsewhere(token, node)

    async def _read(self, node: str, token: _Token, kind: Kind) -> None:
        """Read a session once, or so often that the node gets a mirror of it."""
        for _ in range(self._rng.choice(_READS)):
            await self._call(node, token, kind, {}, self._rng.choice(self._timeouts_s))

    def _nodes(self) -> list[str]:
        return [node for node in self._stubs if node not in self._avoided]

    def _read_token(self, token: _Token) -> _Token:
        if self._retired and self._rng.random() < 0.15:
            return self._rng.choice(self._retired[-10:])
        return token

    def _kind(self, token: _Token) -> Kind:
        kinds = (Kind.GET, Kind.EXISTS, Kind.SET, Kind.ABANDON, Kind.DELETE, Kind.START)
        weights = (60, 8, 18, 6, 2, 0) if token.is_live else (50, 10, 2, 1, 1, 16)
        return self._rng.choices(kinds, weights)[0]

    def _written(self, kind: Kind) -> Mapping[str, int]:
        if kind is Kind.START:
            return {key: next(self._values) for key in KEYS}
        if kind is Kind.SET:
            return {self._rng.choice(KEYS): next(self._values)}
        return {}

    def _learn(self, token: _Token, one: Operation) -> None:
        if one.outcome in {Outcome.MAYBE, Outcome.UNSENT}:
            return
        was_live = token.is_live
        token.is_live = one.kind not in ENDS and one.outcome is not Outcome.ABSENT
        if was_live and not token.is_live:
            token.lives += 1
            if token.lives >= _LIVES and token in self._tokens:
                self._tokens[self._tokens.index(token)] = _Token(next(self._names))
                self._retired.append(token)

    async def _look_elsewhere(self, token: _Token, node: str) -> None:
        """Read at two other nodes what has just been acknowledged: that is where an old copy may be."""
        others = [other for other in self._nodes() if other != node]
        chosen = self._rng.sample(others, min(2, len(others)))
        await asyncio.gather(
            *(self._call(other, token, Kind.GET, {}, self._rng.choice(self._timeouts_s)) for other in chosen)
        )

    async def _call(
        self, node: str, token: _Token, kind: Kind, written: Mapping[str, int], timeout_s: float
    ) -> Operation:
        began_s = time.monotonic()
        seen: dict[str, int] = {}
        error = ""
        try:
            outcome, seen = await _ask(self._stubs[node], token.name, kind, written, timeout_s)
        except grpc.aio.AioRpcError as exc:
            outcome = _OUTCOME_BY_CODE.get(exc.code(), Outcome.MAYBE)
            if outcome is Outcome.MAYBE:
                error = f"{exc.code().name} {exc.details()}"
                outcome = Outcome.UNSENT if _UNSENT in error else outcome
        one = Operation(
            token=token.name,
            kind=kind,
            node=node,
            began_s=began_s,
            ended_s=time.monotonic(),
            deadline_s=began_s + timeout_s,
            outcome=outcome,
            written=written,
            seen=seen,
            error=error,
        )
        self.operations.append(one)
        return one


async def _ask(
    stub: Any,  # noqa: ANN401  # grpc.aio types its stubs for the synchronous API
    token: str,
    kind: Kind,
    written: Mapping[str, int],
    timeout_s: float,
) -> tuple[Outcome, dict[str, int]]:
    match kind:
        case Kind.GET:
            answer = await stub.Get(GetRequest(access_token=token), timeout=timeout_s)
            return Outcome.DONE, _bag(answer.session.bag)
        case Kind.EXISTS:
            found = await stub.Exists(ExistsRequest(access_token=token), timeout=timeout_s)
            return (Outcome.DONE if found.value else Outcome.ABSENT), {}
        case Kind.START:
            bag = {key: f"{CANARY}-{value}" for key, value in written.items()}
            # The subject of a session is its own, so that a Delete by subject ends this one.
            session = Session(access_token=token, subject_id=token, bag=bag)
            await stub.Start(StartRequest(session=session), timeout=timeout_s)
            return Outcome.DONE, {}
        case Kind.SET:
            ((key, value),) = written.items()
            request = SetValueRequest(access_token=token, key=key, value=f"{CANARY}-{value}")
            return Outcome.DONE, _bag((await stub.SetValue(request, timeout=timeout_s)).bag)
        case Kind.ABANDON:
            await stub.Abandon(AbandonRequest(access_token=token), timeout=timeout_s)
            return Outcome.DONE, {}
        case Kind.DELETE:
            deleted = await stub.Delete(DeleteRequest(subject_id=token), timeout=timeout_s)
            return (Outcome.DONE if deleted.value else Outcome.ABSENT), {}


def _bag(bag: Mapping[str, str]) -> dict[str, int]:
    """Read the values; 0, which nobody writes, stands for a key that is missing."""
    return {key: int(bag[key].rpartition("-")[2]) if key in bag else 0 for key in KEYS}
