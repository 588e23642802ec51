"""TLS on both engines: who gets in, who is seen, and certificates that change under way."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from serving import ENGINES, configured

from cluster.errors import PeerUnproven
from cluster.peer_auth import PeerAuth
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers
from cluster.signing import SERVICE_NAME
from mnemosyned.assembly import engine_options
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import ClientAuth, TlsFiles, peer_context
from mnemosyned.transport.call import Call
from mnemosyned.transport.engine import Engine, ListenFailed
from mnemosyned.transport.methods import MethodTable

NAMES = "/test.Test/Names"
SLOW = "/test.Test/Slow"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture(params=sorted(ENGINES))
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _names(call: Call) -> bytes:
    return "|".join(call.certificate_names).encode()


class Server:
    """An engine that tells callers who they are."""

    def __init__(self, engine_name: str, files: TlsFiles) -> None:
        self.may_end = asyncio.Event()
        table = MethodTable()
        table.add_unary("test.Test", "Names", lambda _, call: _names(call))
        sealed = lambda _, call: pb.SealedAnswer(answer=_names(call)).SerializeToString()  # noqa: E731
        table.add_unary(SERVICE_NAME, "Gossip", sealed)
        table.add_unary("test.Test", "Slow", self._slow)
        self.stats = table.unary[SLOW].stats
        self.engine: Engine = ENGINES[engine_name](table, replace(engine_options(configured()), tls=files))
        self.port = 0

    async def _slow(self, message: bytes, _: Call) -> bytes:
        await self.may_end.wait()
        return message

    @asynccontextmanager
    async def channel(
        self, credentials: grpc.ChannelCredentials, name: str = "localhost"
    ) -> AsyncIterator[grpc.aio.Channel]:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", name)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options=options) as channel:
            yield channel

    async def names(self, credentials: grpc.ChannelCredentials, name: str = "localhost") -> str:
        """What the server sees in the caller's certificate."""
        async with self.channel(credentials, name) as channel:
            return (await channel.unary_unary(NAMES)(b"", timeout=5)).decode()


@asynccontextmanager
async def running(engine_name: str, files: TlsFiles) -> AsyncIterator[Server]:
    server = Server(engine_name, files)
    server.port = await server.engine.start()
    try:
        yield server
    finally:
        server.may_end.set()
        await server.engine.drain()


def spoil(files: TlsFiles) -> None:
    Path(files.private_key).write_text("nonsense")


async def refused(server: Server, credentials: grpc.ChannelCredentials, name: str = "localhost") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.names(credentials, name)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_plain_text_and_old_versions_are_refused(authority: Authority, engine_name: str) -> None:
    async with running(engine_name, authority.files("localhost")) as server:
        assert await server.names(authority.credentials()) == ""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(NAMES)(b"", timeout=5)
        old = ssl.create_default_context(cafile=str(authority.path))
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        # An alert, or the end of the connection.
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", server.port, ssl=old, server_hostname="localhost")


async def test_a_required_certificate_is_one_of_our_authorities(
    authority: Authority, engine_name: str, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "theirs")
    directory = foreign.issue("web.example", at="client")
    forged = grpc.ssl_channel_credentials(
        authority.pem, (directory / "key.pem").read_bytes(), (directory / "crt.pem").read_bytes()
    )
    files = authority.files("localhost", client_auth=ClientAuth.REQUIRE)
    async with running(engine_name, files) as server:
        assert await server.names(authority.credentials("web.example", "10.0.0.1")) == "web.example|10.0.0.1"
        await refused(server, authority.credentials())
        await refused(server, forged)


async def test_an_optional_certificate_is_seen_if_there_is_one(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority(tmp_path / "theirs")
    directory = foreign.issue("web.example", at="client")
    forged = grpc.ssl_channel_credentials(
        authority.pem, (directory / "key.pem").read_bytes(), (directory / "crt.pem").read_bytes()
    )
    async with running("h2", authority.files("localhost", client_auth=ClientAuth.OPTIONAL)) as server:
        assert await server.names(authority.credentials("web.example")) == "web.example"
        assert await server.names(authority.credentials()) == ""
        await refused(server, forged)


async def test_where_nobody_is_asked_nobody_is_seen(authority: Authority, engine_name: str) -> None:
    async with running(engine_name, authority.files("localhost")) as server:
        assert await server.names(authority.credentials("web.example")) == ""


async def test_new_certificates_are_served_and_no_call_is_dropped(
    authority: Authority, engine_name: str
) -> None:
    files = authority.files("one.example")
    async with (
        running(engine_name, files) as server,
        server.channel(authority.credentials(), "one.example") as channel,
    ):
        slow = channel.unary_unary(SLOW)(b"x", timeout=30)
        end_s, calls = time.monotonic() + 1.5, 0

        async def call() -> None:
            nonlocal calls
            while time.monotonic() < end_s:
                async with server.channel(authority.credentials(), "any.example") as one:
                    await one.unary_unary(NAMES)(b"", timeout=5)
                calls += 1

        while server.stats.in_flight == 0:
            await asyncio.sleep(0.01)
        authority.issue("one.example", "any.example")
        await server.engine.reload_tls(files.read())
        calling = asyncio.create_task(call())
        for number in range(4):
            await asyncio.sleep(0.2)
            authority.issue(f"n{number}.example", "any.example")
            await server.engine.reload_tls(files.read())
            assert await server.names(authority.credentials(), f"n{number}.example") == ""
        await calling
        await refused(server, authority.credentials(), "one.example")
        server.may_end.set()

        assert await slow == b"x"
        assert calls > 5


async def test_invalid_files_leave_what_is_served(authority: Authority, engine_name: str) -> None:
    files = authority.files("localhost")
    async with running(engine_name, files) as server:
        good = files.read()
        spoil(files)
        if engine_name == "h2":
            # It reads the files itself.
            with pytest.raises(FilesUnusable):
                await server.engine.reload_tls(good)

        assert await server.names(authority.credentials()) == ""


async def test_an_engine_does_not_start_on_invalid_files(authority: Authority, engine_name: str) -> None:
    files = authority.files("localhost")
    spoil(files)

    with pytest.raises(ListenFailed):
        await Server(engine_name, files).engine.start()


async def test_peers_dial_anew_when_they_have_another_identity(tmp_path: Path) -> None:
    """Authorities change in three steps: both are believed, then the new one signs, then it alone is."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    both = tmp_path / "both.pem"
    spell(both, old.pem + new.pem)
    files = replace(old.files("localhost", client_auth=ClientAuth.REQUIRE), authorities=str(both))
    async with running("h2", files) as server:
        peer_auth = PeerAuth([], process=bytes(16))
        peers = Peers(peer_auth, {"Gossip": Uncounted()}, server_name=lambda _: "localhost")
        address = f"127.0.0.1:{server.port}"

        async def seen(identity: Authority, authorities: Path) -> str:
            directory = identity.issue(f"{identity.directory.name}.example", at="peer")
            peers.identify(
                peer_context(
                    TlsFiles(
                        certificate=str(directory / "crt.pem"),
                        private_key=str(directory / "key.pem"),
                        authorities=str(authorities),
                    )
                )
            )
            answer = await peers.call(address, "Gossip", b"", timeout_s=5, channel_kind=ChannelKind.GOSSIP)
            return answer.decode()

        assert await seen(old, old.path) == "old.example"
        assert await seen(old, both) == "old.example"
        renewed = new.issue("localhost", at="node")
        spell(Path(files.certificate), content(renewed / "crt.pem"))
        spell(Path(files.private_key), content(renewed / "key.pem"))
        await server.engine.reload_tls(files.read())
        assert await seen(new, new.path) == "new.example"
        await peers.close()


@pytest.mark.parametrize(("pattern", "is_node"), [("localhost", True), ("*.nodes.example", False)])
async def test_a_callee_is_known_by_its_certificate(
    authority: Authority,
    engine_name: str,
    pattern: str,
    is_node: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    files = authority.files("localhost", client_auth=ClientAuth.REQUIRE)
    async with running(engine_name, files) as server:
        peer_auth = PeerAuth([], [pattern], process=bytes(16))
        peers = Peers(peer_auth, {"Gossip": Uncounted()}, server_name=lambda _: "localhost")
        peers.identify(peer_context(files))
        address = f"127.0.0.1:{server.port}"
        asked = peers.call(address, "Gossip", b"", timeout_s=5, channel_kind=ChannelKind.GOSSIP)
        if is_node:
            assert await asked == b"localhost"
        else:
            with pytest.raises(PeerUnproven, match="peer-names"):
                await asked
        await peers.close()


class Uncounted:
    def begin(self) -> None:
        pass

    def end(self, code: str, elapsed_s: float) -> None:
        pass


def content(path: Path) -> bytes:
    return path.read_bytes()


def spell(path: Path, pem: bytes) -> None:
    path.write_bytes(pem)
