"""What daemons do alike on every storage: calls to one, to two nodes on the same, and around its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import grpc
from clusters import SECRET, free_ports
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import code_of
from processes import Daemon, mnemosyned
from secrecy import CANARY
from waiting import until

NEW = StartRequest(session=Session(subject_id="user:1", refresh_token="r", bag={"k": CANARY}))


class Server(Protocol):
    """A storage that a test may end, and start once more with what it has."""

    def start(self) -> object: ...

    def kill(self) -> None: ...


@contextmanager
def two_nodes(*flags: str) -> Iterator[tuple[SessionManagerStub, SessionManagerStub, Sequence[Daemon]]]:
    """Run two daemons that know each other and have leases; each of them must end well."""
    names = [f"127.0.0.1:{port}" for port in free_ports(2)]
    common = (*flags, f"-cluster.seeds={','.join(names)}", f"-cluster.secret={SECRET}")
    nodes = [Daemon(*common, f"-cluster.listen={name}", f"-port={name.rpartition(':')[2]}") for name in names]
    with nodes[0] as one, nodes[1] as other, one.leased().stub() as here, other.leased().stub() as there:
        yield here, there, nodes
        assert one.stop() == other.stop() == 0


def change_here_and_read_there(
    here: SessionManagerStub, there: SessionManagerStub, number: int, *, timeout_s: float = 10
) -> None:
    """Take a session from its start to its end, and see each step at another node. Raises grpc.RpcError."""
    token = here.Start(NEW, timeout=timeout_s).session.access_token
    assert there.Get(GetRequest(access_token=token), timeout=timeout_s).session.subject_id == "user:1"
    here.SetValue(SetValueRequest(access_token=token, key="n", value=str(number)), timeout=timeout_s)
    assert there.Get(GetRequest(access_token=token), timeout=timeout_s).session.bag["n"] == str(number)
    assert there.Abandon(AbandonRequest(access_token=token), timeout=timeout_s).value
    assert not here.Exists(ExistsRequest(access_token=token), timeout=timeout_s).value


def assert_sessions_survive(flags: Sequence[str], server: Server, *, query: str, outage: str = "") -> Daemon:
    """Restart the storage under a daemon, and then the daemon. `outage` is what its health says meanwhile."""
    with Daemon(*flags) as first, first.serving().stub() as stub:
        kept, ended = (stub.Start(NEW).session.access_token for _ in range(2))
        assert stub.Abandon(AbandonRequest(access_token=ended)).value
        server.kill()
        assert code_of(lambda: stub.Get(GetRequest(access_token=kept))) is grpc.StatusCode.UNAVAILABLE
        until(lambda: first.http("/healthr")[0] == 503)
        assert outage in first.http("/healthr")[1]
        server.start()
        until(lambda: first.http("/healthr")[0] == 200)

        assert dict(stub.Get(GetRequest(access_token=kept)).session.bag) == {"k": CANARY}
        assert code_of(lambda: stub.Get(GetRequest(access_token=ended))) is grpc.StatusCode.NOT_FOUND
        assert query in first.http("/metrics")[1]
        assert first.stop() == 0

    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        assert stub.Get(GetRequest(access_token=kept)).session.subject_id == "user:1"
        listed = stub.List(ListRequest(query=Query(refresh_token="r"))).sessions
        assert [one.access_token for one in listed] == [kept]
        assert stub.Delete(DeleteRequest(subject_id="user:1")).value == 1
    return first


def started(flags: Sequence[str], count: int) -> list[str]:
    """Start sessions by a daemon of their own, and return their tokens; List finds them."""
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        tokens = [stub.Start(NEW).session.access_token for _ in range(count)]
        assert len(stub.List(ListRequest(query=Query(refresh_token="r"), limit=50)).sessions) == count
        assert daemon.stop() == 0
    return tokens


def hashing(flags: Sequence[str], directory: Path) -> tuple[str, ...]:
    """Return flags by which tokens are hashed."""
    key = directory / "token.key"
    key.write_text(f"{CANARY}-the-key-of-the-tokens-of-{directory.name}\n")
    return (*flags, "-token.protection=hmac", f"-token.key.file={key}")


def assert_migrates(flags: Sequence[str], tokens: Sequence[str]) -> None:
    """Have the sessions hashed, and served; `flags` are those of `hashing`."""
    code, out, _ = mnemosyned("migrate", *flags)
    assert (code, str(len(tokens)) in out) == (0, True), out
    assert_served(flags, tokens)


def assert_served(flags: Sequence[str], tokens: Sequence[str]) -> None:
    """Run a daemon that serves these sessions."""
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        for token in tokens:
            assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"


def assert_damage_is_found_and_mended(flags: Sequence[str], *, sessions: int) -> None:
    """Check a storage with so many sessions, of which one is damaged."""
    code, out, _ = mnemosyned("check", *flags)
    assert (code, f"{sessions} sessions checked, 1 damaged" in out) == (1, True), out
    assert mnemosyned("check", "-fix", *flags)[0] == 0


def assert_address_is_taken(
    daemon: Daemon, stub: SessionManagerStub, file: Path, address: str, *, event: str
) -> None:
    """Write another address into its file; no call fails while the daemon changes to it."""
    token = stub.Start(NEW).session.access_token
    file.write_text(address)
    daemon.wait_for(event)
    for _ in range(20):
        assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
