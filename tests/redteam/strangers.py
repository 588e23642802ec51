"""Attacks on a cluster by a stranger that calls its Peer service: with a secret, and without one on loopback.

Without a secret every packet on loopback is believed to be a node's. Even so, one packet must stop nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self

import grpc
from clusters import Cluster, free_ports
from mnemosynerpc.session_pb2 import GetRequest
from processes import Daemon
from redteam import log_lines
from redteam.fake_node import SERVICE, FakeNode
from redteam.lab import Lab, Void, attack, own_session, require, rings_are, wait_until
from redteam.raw import RawConnection, call, headers

from cluster.peerpb import peer_pb2 as pb

_KIND: Final = "stranger"
_METHODS: Final = ("Gossip", "Invalidate", "Leave", "Forward", "Hello")
_SYNC: Final = 6
_ALIVE, _SUSPECT, _DEAD, _LEFT = range(4)
_ACTIVE: Final = 1
_FLOOD_S: Final = 5.0
# Connections in those seconds to members that were only claimed: more would be dialling in bulk.
_MAX_DIALS: Final = 100
ROOT: Final = Path(__file__).parents[2]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _member(name: str, address: str = "", *, generation: int = 0, state: int = _ALIVE) -> pb.Member:
    return pb.Member(
        name=name,
        address=address,
        generation=generation or _now_ms(),
        incarnation=1,
        state=state,
        phase=_ACTIVE,
        instance=hash(name) & 0xFFFF_FFFF,
    )


def _sync(origin: pb.Origin, members: Sequence[pb.Member], sender: pb.Member) -> bytes:
    table = [pb.Update(member=member) for member in members]
    packet = pb.Packet(kind=_SYNC, sender=sender, table=table, updates=table[:16])
    return pb.GossipRequest(origin=origin, packet=packet).SerializeToString()


class _Open:
    """Two nodes without a secret, one of which has told its origin to a seed that is no node."""

    def __init__(self, lab: Lab, *flags: str, table: Sequence[pb.Update] = ()) -> None:
        self.cluster = lab.cluster(2, *flags, secret="")
        self.first, self.second = self.cluster.names
        (port,) = free_ports(1)
        # It never becomes a member: its answers are bytes that are none.
        self.seed = lab.enter(FakeNode(port, "mirror", table=table))
        lab.launch(self.cluster, self.first, seeds=[self.second, self.seed.address])
        lab.launch(self.cluster, self.second, seeds=[self.first])
        found = rings_are(self.cluster, self.cluster.names, self.cluster.names)
        require(found, "the two nodes do not find one another")
        origin = self.seed.origin()
        if origin is None:
            raise Void("the node has not told its origin")
        self.origin = origin
        self.daemon = self.cluster.daemons[self.first]

    def gossip(self, body: bytes, timeout_s: float = 3.0) -> str:
        """Send a packet to the first node; return the status."""
        options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
        with grpc.insecure_channel(self.daemon.address, options=options) as channel:
            return _code(channel, "Gossip", body, timeout_s)

    def check(self, within_s: float = 15.0) -> None:
        """Require that exactly the two nodes own tokens, and both answer."""
        names = self.cluster.names
        right = rings_are(self.cluster, names, names, within_s)
        ring = self.cluster.page(self.first)["ring"]["nodes"]
        require(right, f"{len(ring)} members own tokens, as {ring[:3]}; the nodes are {names}")


def _code(channel: grpc.Channel, method: str, body: bytes, timeout_s: float = 3.0) -> str:
    try:
        channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=timeout_s)
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]  # a Call as well
    return "OK"


def _closed(number: int) -> str:
    return f"127.{number >> 14 & 63}.{number >> 7 & 127}.{number & 127 | 128}:1"


@contextmanager
def _black_hole() -> Iterator[str]:
    """Lend an address of loopback where a connection is never accepted and never refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(4):
            # They fill the queue; what comes later gets no answer from the kernel.
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)
        yield f"{address[0]}:{address[1]}"


class _Counter:
    """Accepts connections, and counts them."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._held.append(self._listener.accept()[0])
                self.accepted += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._held:
            one.close()


def _repeat(node: _Open, make: Callable[[int], bytes]) -> None:
    end_s, number = time.monotonic() + _FLOOD_S, 0
    while time.monotonic() < end_s:
        node.gossip(make(number))
        number += 1
        time.sleep(0.1)


def _made_up(count: int, where: str, lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)
    address = lab.enter(_black_hole()) if where == "a black hole" else ""
    members = [
        _member(_closed(number) if not address else f"127.9.{number >> 8}.{number & 255}:7000", address)
        for number in range(count)
    ]
    body = _sync(node.origin, members, members[0])
    _repeat(node, lambda _: body)
    node.check()


for _count in (60_000, 5_000, 1_000, 900):
    for _where in ("closed ports", "a black hole"):
        attack(
            _KIND,
            f"a SYNC of {_count} made-up members at {_where}",
            quick_on=("h2",) if (_count, _where) == (60_000, "closed ports") else (),
        )(partial(_made_up, _count, _where))


@attack(_KIND, "made-up members that change with each SYNC")
def _changing(lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)

    def make(number: int) -> bytes:
        members = [_member(_closed(number * 900 + at)) for at in range(900)]
        return _sync(node.origin, members, members[0])

    _repeat(node, make)
    node.check()


@attack(_KIND, "made-up members are not dialled in bulk")
def _dials(lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)
    counter = lab.enter(_Counter())
    members = [_member(f"127.9.{at >> 8}.{at & 255}:7000", counter.address) for at in range(900)]
    _repeat(node, lambda _: _sync(node.origin, members, members[0]))
    require(
        counter.accepted <= _MAX_DIALS, f"{counter.accepted} connections to made-up members in {_FLOOD_S} s"
    )
    node.check()


def _claims(state: int, generation: int, address: str, lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)
    sender = _member("127.9.9.9:7000", _closed(1))

    def make(number: int) -> bytes:
        page = {one["name"]: one for one in node.cluster.page(node.first)["members"]}
        known = page.get(node.second, {"generation": _now_ms()})["generation"]
        member = _member(node.second, address, generation=known + generation * (number + 1), state=state)
        return _sync(node.origin, [member], sender)

    _repeat(node, make)
    node.check(within_s=25.0)


for _what, _claim in {
    "is dead": (_DEAD, 0, ""),
    "is dead, in a generation to come": (_DEAD, 10**12, ""),
    "has left": (_LEFT, 1000, ""),
    "has restarted at another address": (_ALIVE, 1000, _closed(2)),
    "has restarted in the last generation": (_ALIVE, 2**58, _closed(2)),
}.items():
    attack(_KIND, f"claims that a node {_what}")(partial(_claims, *_claim))


_NAMES: Final = {
    "control characters": "127.9.9.1\x1b[31m\r\nINJECTED:7000",
    "characters that change direction": "127.9.9.1\u202eINJECTED:7000",
    "100 kB": "a" * 100_000 + ":7000",
    "no port": "127.9.9.1",
    "a space": "127.9 9.1:7000",
    "another alphabet": "n\u043ede.example:7000",
    "markup": "<script>:7000",
    "a label": 'a"} 1\nevil{b="c:7000',
}


@attack(_KIND, "members with names that are no addresses")
def _names(lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)
    for name in _NAMES.values():
        for member in (_member(name), _member("127.9.9.2:7000", name)):
            with contextlib.suppress(ValueError):
                node.gossip(_sync(node.origin, [member], member))
                node.gossip(_sync(node.origin, [member], _member("127.9.9.3:7000")))
    time.sleep(1.0)  # for what it logs
    members = {one["name"] for one in node.cluster.page(node.first)["members"]}
    bad = [what for what, name in _NAMES.items() if name in members]
    require(not bad, f"members with names that have {bad}")
    log_lines.check(node.daemon)
    node.check()


def _no_namespace() -> str:
    is_alone = os.geteuid() == 0 and "MNEMOSYNED_REDTEAM_INSIDE" in os.environ
    return "" if is_alone and shutil.which("ip") else "runs in a network namespace of its own: make redteam"


_METADATA: Final = ("169.254.169.254", "fe80::1", "fd00:ec2::254", "169.254.1.1")


@attack(_KIND, "members at link-local and metadata addresses", needs=_no_namespace)
def _metadata(lab: Lab) -> None:
    for host in _METADATA:
        bits = 128 if ":" in host else 32
        subprocess.run(["ip", "address", "replace", f"{host}/{bits}", "dev", "lo"], check=True)
    node = _Open(lab)
    lab.watch(node.daemon, starts=True)
    reached: list[str] = []
    (port,) = free_ports(1)
    for host in _METADATA:
        _listen(lab, host, port, reached)
    addresses = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in _METADATA]
    # The ways in which 169.254.169.254 can be written.
    addresses += [f"{host}:{port}" for host in ("2852039166", "0xa9fea9fe", "0251.0376.0251.0376")]
    addresses.append(f"[::ffff:169.254.169.254]:{port}")
    members = [_member(address) for address in addresses]
    members += [_member(f"127.9.9.{at}:7000", address) for at, address in enumerate(addresses)]
    _repeat(node, lambda _: _sync(node.origin, members, members[0]))
    require(not reached, f"the node has dialled {sorted(set(reached))}")
    node.check()


def _listen(lab: Lab, host: str, port: int, reached: list[str]) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = (host, port, 0, socket.if_nametoindex("lo")) if ":" in host else (host, port)
    listener = lab.enter(socket.create_server(address, family=family))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                reached.append(host)
                connection.close()

    threading.Thread(target=accept, daemon=True).start()


def _bodies(name: str) -> dict[str, bytes]:
    item = pb.Item(method="Exists", message=GetRequest(access_token="t").SerializeToString(), timeout_ms=500)
    batch = pb.Batch(origin=pb.Origin(callee=name), items=[item]).SerializeToString()
    return {
        "Gossip": _sync(pb.Origin(), [], _member("127.9.9.9:7000")),
        "Invalidate": pb.InvalidateRequest(tokens=["t"]).SerializeToString(),
        "Leave": pb.LeaveRequest(node=name).SerializeToString(),
        "Forward": pb.ForwardRequest(batch=batch).SerializeToString(),
        "Hello": b"",
    }


def _answered(daemon: Daemon, name: str, metadata: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Make every call of the Peer service; return the methods that were answered with OK."""
    found = []
    with grpc.insecure_channel(daemon.address) as channel:
        for method, body in _bodies(name).items():
            try:
                channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=2, metadata=metadata)
            except grpc.RpcError:
                continue
            found.append(method)
    return found


_SIGNATURES: Final = {
    "no signature": (),
    "nonsense": (("mnemosyned-peer", "v1 1 2 3"),),
    "two signatures": (("mnemosyned-peer", "v1"), ("mnemosyned-peer", "v2")),
    "another version": (("mnemosyned-peer", f"v2 {_now_ms()} {'00' * 12} {'00' * 32}"),),
    "a long signature": (("mnemosyned-peer", "v1 " + "9" * 8000),),
}


@attack(_KIND, "calls of the Peer service without the secret", quick_on=("grpcio",))
def _without_secret(lab: Lab) -> None:
    cluster = lab.cluster(2)
    for name in cluster.names:
        lab.launch(cluster, name)
    daemon = cluster.daemons[cluster.names[0]]
    lab.watch(daemon)
    for what, metadata in _SIGNATURES.items():
        # Hello may be answered: what it says proves the callee, and gives nothing to the caller.
        answered = set(_answered(daemon, cluster.names[0], metadata)) - {"Hello"}
        require(not answered, f"with {what}, {sorted(answered)} were answered")
    require(daemon.process.poll() is None, "a Leave without the secret ended the node")


@attack(_KIND, "Leave without proof, from this host, without a secret", quick_on=("h2",))
def _leave(lab: Lab) -> None:
    node = _Open(lab)
    lab.watch(node.daemon)
    answered = _answered(node.daemon, node.first)
    wait_until(lambda: node.daemon.process.poll() is not None, 1.5)
    require(node.daemon.process.poll() is None, "a Leave without proof ended the node")
    require("Leave" not in answered, "a Leave without proof was answered with OK")


_PEER_PATHS: Final = (
    "/mnemosynepeer.Peer/{}",
    "/mnemosynepeer.Peer/{}?x",
    "/mnemosynepeer.Pee%72/{}",
    "/mnemosynepeer.Peer%2F{}",
    "//mnemosynepeer.Peer/{}",
    "/./mnemosynepeer.Peer/{}",
    "/x/../mnemosynepeer.Peer/{}",
    "http://nodes/mnemosynepeer.Peer/{}",
    "/MNEMOSYNEPEER.Peer/{}",
    "/mnemosynepeer.Peer/{}/",
)


@attack(
    _KIND,
    "the Peer service through deploy/haproxy.cfg",
    needs=lambda: "" if shutil.which("haproxy") else "haproxy is not installed",
)
def _through_proxy(lab: Lab) -> None:
    cluster = lab.cluster(3, secret="")
    for name in cluster.names:
        lab.launch(cluster, name)
    daemon = cluster.daemons[cluster.names[0]]
    lab.watch(daemon)
    address = lab.enter(_proxy(cluster, lab.scratch))
    token = own_session(daemon)
    require(_reads(address, token), "the proxy does not answer clients")
    for path in _PEER_PATHS:
        for method, body in _bodies(cluster.names[0]).items():
            with RawConnection(address) as client:
                client.send(call(headers(path.format(method).encode()), body))
                status = client.answer(1, within_s=1.0).status
            # A node answers each call of gRPC with a status, also one that it refuses.
            require(not status.isdigit() or path != _PEER_PATHS[0], f"{method} passed the proxy: {status}")
            require(status != "0", f"{path.format(method)} passed the proxy, and was done")
    wait_until(lambda: any(one.process.poll() is not None for one in cluster.daemons.values()), 1.5)
    ended = [name for name, one in cluster.daemons.items() if one.process.poll() is not None]
    require(not ended, f"a Leave through the proxy ended {ended}")


def _reads(address: str, token: str) -> bool:
    message = GetRequest(access_token=token).SerializeToString()
    path = b"/mnemosynerpc.SessionManager/Get"

    def reads() -> bool:
        with RawConnection(address) as client:
            client.send(call(headers(path), message))
            return client.answer(1).status == "0"

    return wait_until(reads, 5.0)


@contextmanager
def _proxy(cluster: Cluster, directory: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    text = (ROOT / "deploy" / "haproxy.cfg").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for example, name in zip((8080, 8082, 8084), cluster.names, strict=True):
        text = text.replace(f"127.0.0.1:{example}\n", f"{name}\n")
    (directory / "haproxy.cfg").write_text(text)
    with subprocess.Popen(["haproxy", "-f", str(directory / "haproxy.cfg")]) as process:
        try:
            end_s = time.monotonic() + 10
            while time.monotonic() < end_s:
                with (
                    contextlib.suppress(ConnectionRefusedError),
                    socket.create_connection(("127.0.0.1", port)),
                ):
                    break
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
