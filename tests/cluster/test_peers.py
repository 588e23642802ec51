"""Channels to peers, on a real server that answers what it is sent."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from clusters import free_ports

from cluster.errors import PeerRefused, PeerTimeout, PeerUnproven, PeerUnreachable, UnauthenticatedPeer
from cluster.failure_signs import is_refused
from cluster.forward_stream import ForwardStream
from cluster.peer_auth import METADATA_KEY, NO_KEY, PeerAuth, PeerKey
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers

METHODS = ("Gossip", "Forward", "Invalidate")


@dataclass
class Stats:
    begun: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        self.begun += 1

    def end(self, code: str, _elapsed_s: float) -> None:
        self.codes[code] += 1


SECRET = b"a-secret-of-a-cluster"
NAME = "the-callee:1"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Echo(grpc.GenericRpcHandler):
    """A node that answers each message with itself; `late` late, `refuse` and `fail` with a status.

    `forges` says what it does wrong.
    """

    def __init__(self, secret: bytes = SECRET) -> None:
        self.forges = ""
        self.is_trusting = False  # it takes calls without a proof
        self.received: list[bytes] = []
        self._auth = PeerAuth([secret], process=os.urandom(16))

    def service(self, call: Any) -> Any:  # noqa: ANN401  # grpcio's own types are private
        if call.method.endswith("/Forward"):
            return grpc.stream_stream_rpc_method_handler(self._stream)
        method = call.method.rpartition("/")[2]

        async def answer(message: bytes, context: Any) -> bytes:  # noqa: ANN401
            return await self._unary(method, message, context)

        return grpc.unary_unary_rpc_method_handler(answer)

    async def _unary(self, method: str, message: bytes, context: Any) -> bytes:  # noqa: ANN401
        signature = dict(context.invocation_metadata()).get(METADATA_KEY, "")
        if method == "Hello":
            if self.forges == "refusal":
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no secret")
            try:
                key = self._key(signature, method, message)
            except UnauthenticatedPeer:
                # A stranger's best try.
                key = PeerKey(hmac.new(b"guess", digestmod="sha256"), "")
            proof = {"no proof": b"", "a guess": bytes(32)}.get(self.forges, self._auth.proof(signature, key))
            return pb.HelloResponse(process=self._auth.process, proof=proof).SerializeToString()
        self.received.append(message)
        key = self._key(signature, method, message)
        answer = await self._answer(message, context)
        seal = {"no seal": b"", "a wrong seal": bytes(32)}.get(self.forges, key.seal(signature, answer))
        return pb.SealedAnswer(answer=answer, seal=seal).SerializeToString()

    def _key(self, signature: str, method: str, message: bytes) -> PeerKey:
        if self.is_trusting:
            assert signature == ""
            return NO_KEY
        return self._auth.check(
            signature, method, message, certificate_names=(), peer="127.0.0.1:1", now_ms=now_ms()
        )

    async def _answer(self, message: bytes, context: Any) -> bytes:  # noqa: ANN401
        if message == b"late":
            await asyncio.sleep(5)
        if message == b"refuse":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no secret")
        if message == b"fail":
            await context.abort(grpc.StatusCode.INTERNAL, "oh")
        return message

    async def _stream(self, messages: AsyncIterator[bytes], context: Any) -> None:  # noqa: ANN401
        signature = dict(context.invocation_metadata()).get(METADATA_KEY, "")
        batches, answers = self._key(signature, "Forward", b"").stream_macs(signature)
        async for message in messages:
            request = pb.ForwardRequest.FromString(message)
            batches.check(request.seal, request.batch)
            self.received.append(request.batch)
            if request.batch == b"end":
                return
            answer = await self._answer(request.batch, context)
            seal = {"no seal": b"", "a wrong seal": bytes(32)}.get(self.forges, answers.seal(answer))
            await context.write(pb.ForwardResponse(answers=answer, seal=seal).SerializeToString())


@dataclass
class Setup:
    peers: Peers
    address: str
    stats: dict[str, Stats]
    server: grpc.aio.Server
    echo: Echo

    async def call(self, body: bytes, *, timeout_s: float = 5.0) -> bytes:
        return await self.peers.call(
            self.address, "Gossip", body, timeout_s=timeout_s, channel_kind=ChannelKind.GOSSIP
        )

    def open_stream(self) -> ForwardStream:
        return self.peers.open_stream(self.address, NAME)


async def serve(echo: Echo, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    echo = Echo()
    server, port = await serve(echo)
    stats = {method: Stats() for method in METHODS}
    peers = Peers(PeerAuth([SECRET], process=os.urandom(16)), stats)
    setup = Setup(peers, f"127.0.0.1:{port}", stats, server, echo)
    yield setup
    await peers.close()
    await setup.server.stop(None)


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_met():
            await asyncio.sleep(0.01)


async def test_an_answer_comes_back_and_is_counted(setup: Setup) -> None:
    assert await setup.call(b"hello") == b"hello"
    assert setup.stats["Gossip"].codes == {"OK": 1}


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        (b"refuse", PeerRefused, "UNAUTHENTICATED"),
        (b"fail", PeerUnreachable, "INTERNAL"),
        (b"late", PeerTimeout, "DEADLINE_EXCEEDED"),
    ],
)
async def test_a_failure_is_one_of_ours(setup: Setup, body: bytes, error: type[Exception], code: str) -> None:
    with pytest.raises(error):
        await setup.call(body, timeout_s=0.2)

    assert setup.stats["Gossip"].codes == {code: 1}


async def test_a_peer_that_is_not_there_is_unreachable(setup: Setup) -> None:
    setup.address = f"127.0.0.1:{free_ports(1)[0]}"

    with pytest.raises(PeerUnreachable):
        await setup.call(b"hello")


async def test_a_process_that_says_it_is_there_is_dialled_at_once(setup: Setup) -> None:
    port = free_ports(1)[0]
    setup.address = f"127.0.0.1:{port}"
    # Each dial in vain makes the pause before the next one longer.
    for _ in range(3):
        with pytest.raises(PeerUnreachable):
            await setup.call(b"hello")
        setup.peers.dial_soon(setup.address)
    with pytest.raises(PeerUnreachable):
        await setup.call(b"hello")
    server, _ = await serve(setup.echo, port)

    setup.peers.dial_soon(setup.address)

    assert await setup.call(b"hello") == b"hello"
    await server.stop(None)


async def test_a_call_whose_channel_is_closed_is_unreachable(setup: Setup) -> None:
    await setup.call(b"hello")
    waiting = asyncio.create_task(setup.call(b"late"))
    await until(lambda: setup.stats["Gossip"].begun == 2)
    await asyncio.sleep(0.05)
    setup.peers.forget(setup.address)

    with pytest.raises(PeerUnreachable):
        await waiting
    assert await setup.call(b"hello") == b"hello"


async def test_a_stream_answers_one_batch_after_another(setup: Setup) -> None:
    stream = setup.open_stream()
    for number in range(5):
        assert await stream.ask(str(number).encode(), timeout_s=5) == str(number).encode()
    assert stream.is_open
    stream.end()
    await until(lambda: not stream.is_open)
    stream.end()

    assert setup.stats["Forward"].codes == {"OK": 5}


@pytest.mark.parametrize(
    ("batch", "error"), [(b"refuse", PeerRefused), (b"late", PeerTimeout), (b"end", PeerUnreachable)]
)
async def test_a_stream_is_over_after_a_failure(setup: Setup, batch: bytes, error: type[Exception]) -> None:
    stream = setup.open_stream()
    await stream.ask(b"hello", timeout_s=5)
    with pytest.raises(error):
        await stream.ask(batch, timeout_s=0.2)
    assert not stream.is_open

    with pytest.raises(PeerUnreachable):
        await stream.ask(b"hello", timeout_s=5)


async def test_a_stream_may_end_while_its_channel_is_closed(setup: Setup) -> None:
    for turns in range(40):
        stream = setup.open_stream()
        await stream.ask(b"hello", timeout_s=5)
        setup.peers.forget(setup.address)
        for _ in range(turns % 4):
            await asyncio.sleep(0)

        stream.end()


async def test_a_stream_is_not_used_again_when_its_channel_is_about_to_close(setup: Setup) -> None:
    stream = setup.open_stream()
    assert await stream.ask(b"hello", timeout_s=5) == b"hello"
    setup.peers._hang_up(setup.address, ChannelKind.CALLS, grace_s=5.0)
    assert not stream.is_open
    fresh = setup.open_stream()

    assert await fresh.ask(b"hello", timeout_s=5) == b"hello"
    assert fresh.is_open
    stream.end()
    fresh.end()


async def test_each_loss_of_a_connection_is_told(setup: Setup) -> None:
    losses: list[None] = []
    watching = asyncio.create_task(setup.peers.keep_connected(setup.address, lambda: losses.append(None)))
    await setup.call(b"hello")
    await setup.server.stop(None)
    # The next dial may still meet the server that stops, and is then lost too.
    await until(lambda: len(losses) >= 1)

    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_process_of_the_same_daemon_is_called_through_its_socket_without_proof(
    tmp_path: Path,
) -> None:
    echo, path = Echo(secret=b"another"), str(tmp_path / "peers-2")
    echo.is_trusting = True
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((echo,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    stats = {method: Stats() for method in METHODS}
    auth = PeerAuth([SECRET], process=os.urandom(16))
    peers = Peers(auth, stats, socket_at=lambda address: path if address == "192.0.2.1:1" else "")
    setup = Setup(peers, "192.0.2.1:1", stats, server, echo)

    assert await setup.call(b"hello") == b"hello"
    assert await setup.open_stream().ask(b"batch", timeout_s=5) == b"batch"
    assert not await is_refused(setup.address, path)
    await peers.close()
    await server.stop(None)
    assert await is_refused(setup.address, path)


@pytest.mark.parametrize("forges", ["no proof", "a guess"])
async def test_a_process_that_proves_nothing_is_sent_nothing(setup: Setup, forges: str) -> None:
    setup.echo.forges = forges
    with pytest.raises(PeerUnproven, match="does not prove"):
        await setup.call(b"hello")
    with pytest.raises(PeerUnproven, match="does not prove"):
        await setup.open_stream().ask(b"hello", timeout_s=5)

    assert setup.echo.received == []
    assert setup.stats["Gossip"].codes == {"UNAUTHENTICATED": 1}


async def test_a_process_with_another_secret_is_sent_nothing(setup: Setup) -> None:
    echo = Echo(b"a-guess-of-a-stranger")
    server, port = await serve(echo)
    setup.address = f"127.0.0.1:{port}"
    with pytest.raises(PeerUnproven):
        await setup.call(b"hello")
    await server.stop(None)

    assert echo.received == []


async def test_a_refused_greeting_is_a_refusal(setup: Setup) -> None:
    setup.echo.forges = "refusal"

    with pytest.raises(PeerRefused, match="no secret"):
        await setup.call(b"hello")


@pytest.mark.parametrize("forges", ["no seal", "a wrong seal"])
async def test_an_answer_that_is_not_sealed_is_none(setup: Setup, forges: str) -> None:
    assert await setup.call(b"hello") == b"hello"
    setup.echo.forges = forges
    with pytest.raises(PeerUnproven, match="not sealed"):
        await setup.call(b"hello")
    stream = setup.open_stream()
    with pytest.raises(PeerUnproven, match="not sealed"):
        await stream.ask(b"hello", timeout_s=5)
    assert not stream.is_open
    setup.echo.forges = ""

    assert await setup.call(b"hello") == b"hello"


async def test_another_process_at_the_address_is_greeted_again(setup: Setup) -> None:
    assert await setup.call(b"hello") == b"hello"
    await setup.server.stop(None)
    setup.echo = Echo()
    setup.server, _ = await serve(setup.echo, int(setup.address.rpartition(":")[2]))
    async with asyncio.timeout(5):
        while True:
            try:
                assert await setup.call(b"again") == b"again"
            except PeerUnreachable:
                continue
            break

    assert setup.echo.received == [b"again"]
