"""Redis Clusters for the tests: primaries with a replica each, formed without redis-cli."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from child_servers import free_port
from hiredis import Reader, pack_command
from redis_servers import PASSWORD, RedisServer, programs
from waiting import until

SLOTS: Final = 16384
_NODE_TIMEOUT_MS: Final = 2000


def call(server: RedisServer, *commands: Sequence[str | bytes | int]) -> list[Any]:
    """Send commands; return their replies, of which some may be errors."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        reader = Reader()
        connection.sendall(b"".join(pack_command(words) for words in [("AUTH", PASSWORD), *commands]))
        replies: list[Any] = []
        while len(replies) <= len(commands):
            reply = reader.gets()
            if reply is not False:
                replies.append(reply)
                continue
            received = connection.recv(2**16)
            if not received:
                raise ConnectionResetError
            reader.feed(received)
    return replies[1:]


@dataclass
class RedisCluster:
    """Nodes that have found one another; the roles of a primary and its replica may change."""

    nodes: list[RedisServer]
    host: str = "127.0.0.1"  # where clients and nodes find them

    @property
    def url(self) -> str:
        hosts = ",".join(f"{self.host}:{node.port}" for node in self.nodes)
        return f"redis+cluster://:{PASSWORD}@{hosts}"

    def living(self) -> list[RedisServer]:
        return [node for node in self.nodes if node.process is not None and node.process.poll() is None]

    def node(self, port: int) -> RedisServer:
        (found,) = [node for node in self.nodes if node.port == port]
        return found

    def ranges(self) -> list[tuple[int, int, list[int]]]:
        """Return first and last slot, and the ports of the primary and its replicas, as a node tells it."""
        (reply,) = call(self.living()[0], ("CLUSTER", "SLOTS"))
        return [(first, last, [node[1] for node in nodes]) for first, last, *nodes in reply]

    def primary_of(self, slot: int) -> RedisServer:
        for first, last, ports in self.ranges():
            if first <= slot <= last:
                return self.node(ports[0])
        raise AssertionError(slot)

    def primaries(self) -> list[RedisServer]:
        return [self.node(port) for port in {ports[0]: None for _, _, ports in self.ranges()}]

    def replica_of(self, primary: RedisServer) -> RedisServer:
        # Of themselves: others hear of it later.
        port = primary.settings.get("tls-port", primary.port)
        for node in self.living():
            if f"master_port:{port}\r".encode() in call(node, ("INFO", "replication"))[0]:
                return node
        raise AssertionError(primary.port)

    def id_of(self, node: RedisServer) -> bytes:
        (found,) = call(node, ("CLUSTER", "MYID"))
        assert isinstance(found, bytes)
        return found

    def until_whole(self, replicas: int = 1) -> None:
        """Wait until all living nodes agree on the slots, and each primary has its replicas."""

        def is_whole() -> bool:
            with suppress(OSError):
                return self._is_whole(replicas)
            return False

        until(is_whole)

    def _is_whole(self, replicas: int) -> bool:
        views = set()
        for node in self.living():
            info, slots = call(node, ("CLUSTER", "INFO"), ("CLUSTER", "SLOTS"))
            if b"cluster_state:ok" not in info:
                return False
            views.add(str(sorted((one[0], one[1], one[2][1]) for one in slots)))
        followed = [
            call(primary, ("INFO", "replication"))[0].count(b"state=online") for primary in self.primaries()
        ]
        return len(views) == 1 and min(followed) >= replicas

    def move_slot(self, slot: int, target: RedisServer, *, pause: Callable[[], None] | None = None) -> None:
        """Hand a slot over key by key, as `redis-cli` does; `pause` is called in the middle."""
        source = self.primary_of(slot)
        if source is target:
            return
        its, theirs = self.id_of(target), self.id_of(source)
        call(target, ("CLUSTER", "SETSLOT", slot, "IMPORTING", theirs))
        call(source, ("CLUSTER", "SETSLOT", slot, "MIGRATING", its))
        while True:
            (keys,) = call(source, ("CLUSTER", "GETKEYSINSLOT", slot, 10))
            if not keys:
                break
            (moved,) = call(
                source,
                ("MIGRATE", self.host, target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys),
            )
            assert moved in {b"OK", b"NOKEY"}, moved
            if pause is not None:
                pause()
        for node in (target, source, *self.primaries()):
            (done,) = call(node, ("CLUSTER", "SETSLOT", slot, "NODE", its))
            assert done == b"OK", done

    def move_slots_without_keys(self, source: RedisServer, target: RedisServer) -> None:
        """Hand over all that a node has left; the cluster goes on to know it."""
        its = self.id_of(target)
        for first, last, ports in self.ranges():
            if ports[0] == source.port:
                handing = [("CLUSTER", "SETSLOT", slot, "NODE", its) for slot in range(first, last + 1)]
                # The source follows the target once it has none left.
                for node in (target, *(one for one in self.primaries() if one is not target)):
                    replies = set(call(node, *handing))
                    assert replies == {b"OK"}, replies
        until(lambda: source not in self.primaries())


@contextmanager
def joining(cluster: RedisCluster) -> Iterator[RedisServer]:
    """Add a node without slots."""
    first = cluster.nodes[0]
    settings = first.settings | {"cluster-port": str(free_port())}
    with RedisServer(first.directory.parent / "joining", first.program, settings) as node:
        bus = settings["cluster-port"]
        assert call(first, ("CLUSTER", "MEET", cluster.host, node.port, bus)) == [b"OK"]
        cluster.nodes.append(node)
        known = f"cluster_known_nodes:{len(cluster.nodes)}".encode()
        until(lambda: all(known in call(one, ("CLUSTER", "INFO"))[0] for one in cluster.nodes))
        cluster.until_whole(0)
        yield node


@contextmanager
def redis_cluster(
    directory: Path, kind: str = "", replicas: int = 1, *, host: str = "127.0.0.1", **settings: str
) -> Iterator[RedisCluster]:
    """Run a cluster of three primaries."""
    found = programs()
    kind = kind or ("valkey" if "valkey" in found else next(iter(found)))
    directory.mkdir(exist_ok=True)
    common = {
        "bind": f"127.0.0.1 {host}" if host != "127.0.0.1" else host,
        "cluster-announce-ip": host,
        "cluster-enabled": "yes",
        "cluster-config-file": "nodes.conf",
        "cluster-node-timeout": str(_NODE_TIMEOUT_MS),
        "cluster-replica-validity-factor": "0",
        **settings,
    }
    ports = ["cluster-port", *(["tls-port"] if "tls-cert-file" in settings else [])]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                RedisServer(
                    directory / str(number), found[kind], common | {port: str(free_port()) for port in ports}
                )
            )
            for number in range(3 * (1 + replicas))
        ]
        cluster = RedisCluster(nodes, host)
        _form(cluster, replicas)
        yield cluster


def _form(cluster: RedisCluster, replicas: int) -> None:
    nodes = cluster.nodes
    for number, node in enumerate(nodes[:3]):
        first, last = number * SLOTS // 3, (number + 1) * SLOTS // 3 - 1
        assert call(node, ("CLUSTER", "ADDSLOTSRANGE", first, last)) == [b"OK"]
    for number, node in enumerate(nodes):
        # Without it, nodes of one epoch have to find out.
        call(node, ("CLUSTER", "SET-CONFIG-EPOCH", number + 1))
    for node in nodes[1:]:
        bus = node.settings["cluster-port"]
        assert call(nodes[0], ("CLUSTER", "MEET", cluster.host, node.port, bus)) == [b"OK"]
    known = f"cluster_known_nodes:{len(nodes)}".encode()
    until(lambda: all(known in call(node, ("CLUSTER", "INFO"))[0] for node in nodes))
    for number, node in enumerate(nodes[3:]):
        primary = cluster.id_of(nodes[number % 3])
        until(lambda node=node, primary=primary: call(node, ("CLUSTER", "REPLICATE", primary)) == [b"OK"])
    cluster.until_whole(replicas)
