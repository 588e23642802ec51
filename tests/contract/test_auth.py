"""Who may call what, on both engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from peering import Peer, peering
from prometheus_client import CollectorRegistry
from serving import ENGINES

from mnemosyned.api import session_manager
from mnemosyned.api.auth import KEY_METADATA, LEAST_ROLE, guard
from mnemosyned.observe.metrics import AuthMetrics
from mnemosyned.security.api_keys import Callers, Role
from mnemosyned.storage.memory import MemoryStore

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
CALLS = {
    "Start": StartRequest(session=Session(subject_id="s")),
    "Get": GetRequest(access_token="t"),
    "Exists": ExistsRequest(access_token="t"),
    "SetValue": SetValueRequest(access_token="t", key="k"),
    "Abandon": AbandonRequest(access_token="t"),
    "List": ListRequest(),
    "Delete": DeleteRequest(subject_id="s"),
}
KEYS = {
    Role.READONLY: "a-key-to-read",
    Role.SESSION: "a-key-for-sessions",
    Role.ADMIN: "a-key-for-everything",
}


class Known(Callers):
    """Callers by their keys, unhashed."""

    def role_of(self, key: str | None, _certificate_names: object) -> Role | None:
        return next((role for role, one in KEYS.items() if one == key), None)


@dataclass
class Guarded:
    peer: Peer
    registry: CollectorRegistry

    async def status(self, method: str, key: str | None) -> tuple[grpc.StatusCode, str]:
        metadata = ((KEY_METADATA, key),) if key is not None else ()
        try:
            await getattr(self.peer.stub, method)(CALLS[method], metadata=metadata)
        except grpc.aio.AioRpcError as exc:
            return exc.code(), exc.details() or ""
        return grpc.StatusCode.OK, ""

    def refusals(self, reason: str) -> float:
        return self.registry.get_sample_value("mnemosyned_auth_refusals_total", {"reason": reason}) or 0.0


@asynccontextmanager
async def guarded(store: MemoryStore, engine: str, *seeds: str) -> AsyncIterator[Guarded]:
    registry = CollectorRegistry()

    def protect(table: Any) -> None:  # noqa: ANN401  # a MethodTable
        guard(table, lambda: Known(role_by_digest={}, role_by_name={}), AuthMetrics(registry))

    async with peering(store, engine, seeds=seeds, prepare=protect) as peer:
        yield Guarded(peer, registry)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=sorted(ENGINES))
async def node(request: pytest.FixtureRequest, store: MemoryStore) -> AsyncIterator[Guarded]:
    async with guarded(store, request.param) as one:
        yield one


async def test_each_role_may_call_its_methods_and_no_others(node: Guarded) -> None:
    for role, key in KEYS.items():
        for method in CALLS:
            code, text = await node.status(method, key)
            if LEAST_ROLE.get(method, Role.ADMIN) <= role:
                assert code not in {DENIED, UNKNOWN}, (role, method)
            else:
                assert code is DENIED
                assert text == (
                    f"mnemosyned: {method} needs the role "
                    f"{LEAST_ROLE.get(method, Role.ADMIN).word}, and this is {role.word}"
                )


async def test_without_a_key_that_is_known_nothing_may_be_called(node: Guarded) -> None:
    for method in CALLS:
        assert await node.status(method, None) == (
            UNKNOWN,
            f"mnemosyned: the call has no API key (metadata {KEY_METADATA})",
        )
        code, text = await node.status(method, "guessed")
        assert code is UNKNOWN
        assert "guessed" not in text
    assert node.refusals("missing") == node.refusals("unknown") == len(CALLS)
    await node.status("List", KEYS[Role.SESSION])

    assert node.refusals("role") == 1


async def test_the_token_of_a_context_is_no_key_and_older_names_are_guarded_too(node: Guarded) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.peer.stub.Context(Empty(), metadata=(("authorization", "t"),))
    assert caught.value.code() is UNKNOWN
    for name in ("Create", "SetData"):
        call = node.peer.channel.unary_unary(f"/{session_manager.SERVICE_NAME}/{name}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is UNKNOWN


async def test_what_one_node_has_let_in_its_peers_answer(store: MemoryStore) -> None:
    async with guarded(store, "h2") as one, guarded(store, "h2", one.peer.address) as other:
        metadata = ((KEY_METADATA, KEYS[Role.SESSION]),)
        stubs: list[Any] = [SessionManagerStub(node.peer.channel) for node in (one, other)]
        tokens = [
            (await stubs[0].Start(CALLS["Start"], metadata=metadata)).session.access_token for _ in range(8)
        ]
        for token in tokens:
            assert (
                await stubs[1].Get(GetRequest(access_token=token), metadata=metadata)
            ).session.access_token

        assert one.refusals("missing") == other.refusals("missing") == 0
