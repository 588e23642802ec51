"""What rows are measured in: servers on one core, sessions in them, and the calls of a load."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count as counting
from itertools import cycle
from pathlib import Path

from child_servers import free_port
from clusters import Cluster
from common import SERVER_CORE, pin
from load import Outcome, Request, closed, request
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from processes import Daemon
from redis_clusters import RedisCluster, redis_cluster
from redis_servers import RedisServer, redis_server

from mnemosyned.embedded.server import EmbeddedPostgres

REDIS_SETTINGS = {"zset-max-listpack-value": "160"}
ECHO = Path(__file__).parents[1] / "echo.py"


@dataclass
class Server:
    """A daemon, or the echo: where it is called, and its processes."""

    address: str
    pids: Sequence[int]

    def cpu_us(self, run: Callable[[], Outcome]) -> tuple[float, Outcome]:
        """Return the CPU that each call cost the server's processes, and the outcome."""
        before = sum(map(cpu_ns, self.pids))
        outcome = run()
        return (sum(map(cpu_ns, self.pids)) - before) / 1000 / len(outcome.latencies_s), outcome


class Bench:
    """One row's servers, which end with it."""

    def __init__(self, directory: Path, stack: ExitStack, *, is_quick: bool, rounds: int) -> None:
        self.directory = directory
        self.is_quick = is_quick
        self.rounds = rounds
        self._stack = stack

    def at_end(self, undo: Callable[[], object]) -> None:
        """Call this when the row ends."""
        self._stack.callback(undo)

    def scaled(self, count: int, quick: int | None = None) -> int:
        """Return a count of the full form, or the one of the quick form, a fifth if none is given."""
        return count if not self.is_quick else quick or max(1, count // 5)

    def postgres(self) -> str:
        """Start a PostgreSQL, with fsync, on the load's core; return its address."""
        server = self._stack.enter_context(EmbeddedPostgres.start(self.directory / "postgres"))
        return server.dsn

    def redis(self, name: str = "redis", **settings: str) -> RedisServer:
        """Start a Redis as docs/redis.md advises, on the load's core."""
        return self._stack.enter_context(redis_server(self.directory / name, **REDIS_SETTINGS, **settings))

    def redis_cluster(self) -> RedisCluster:
        """Start three primaries with the same settings, on the load's core."""
        return self._stack.enter_context(
            redis_cluster(self.directory / "redis cluster", replicas=0, **REDIS_SETTINGS)
        )

    def daemon(self, *flags: str) -> Daemon:
        """Start a daemon on the server's core, with its lease."""
        daemon = self._stack.enter_context(Daemon(*flags))
        if "-storage=memory" in flags:
            daemon.serving()
        else:
            daemon.leased()
        pin(daemon.process.pid, SERVER_CORE)
        return daemon

    def cluster(self, dsn: str, count: int, *flags: str) -> Cluster:
        cluster = self._stack.enter_context(Cluster(dsn, count, *flags))
        cluster.start()
        for daemon in cluster.daemons.values():
            pin(daemon.process.pid, SERVER_CORE)
        end_s = time.monotonic() + 15
        while any(cluster.ring(name) != sorted(cluster.names) for name in cluster.names):
            assert time.monotonic() < end_s, "the nodes have not met"
            time.sleep(0.05)
        time.sleep(2.0)  # until the ring is settled, and copies may be kept (cluster/lease.py)
        return cluster

    def echo(self, size: int) -> Server:
        """Start the least that a gRPC server can do, with answers of so many bytes."""
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, str(ECHO), str(port), str(size)], stderr=subprocess.DEVNULL
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        pin(process.pid, SERVER_CORE)
        echo = Server(f"127.0.0.1:{port}", [process.pid])
        _wait_for(echo.address)
        return echo


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, all its threads."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        total += int((thread / "schedstat").read_text().split()[0])
    return total


def server(daemon: Daemon) -> Server:
    return Server(daemon.address, [daemon.process.pid])


def session(number: int) -> Session:
    """Return a session with a bag of three entries."""
    return Session(
        access_token=random.Random(number).randbytes(64).hex(),  # no secret
        subject_id=f"user:{number}",
        subject_client="web",
        bag={"name": "Ada Lovelace", "theme": "dark", "language": "en"},
    )


ANSWER_BYTES = len(StartRequest(session=session(0)).SerializeToString()) + 14  # and the expiry


def start(addresses: Sequence[str], numbers: range) -> Outcome:
    """Start these sessions."""
    calls = (request("Start", StartRequest(session=session(number))) for number in numbers)
    return closed(addresses, calls, len(numbers))


def starts(first: int) -> Iterator[Request]:
    """Yield the starts of ever new sessions, from this number on; the daemon chooses their tokens."""
    return (request("Start", StartRequest(session=_without_token(number))) for number in counting(first))


def _without_token(number: int) -> Session:
    new = session(number)
    new.access_token = ""
    return new


def gets(numbers: range) -> list[Request]:
    return [request("Get", GetRequest(access_token=session(number).access_token)) for number in numbers]


def at_random(calls: Sequence[Request]) -> Iterator[Request]:
    """Return these calls in a random sequence that repeats."""
    count = max(len(calls), 20_000)
    return cycle(random.Random(1).choices(calls, k=count))  # no secret


def ok_calls(daemons: Sequence[Daemon], method: str) -> float:
    """Return how many calls of clients these daemons have answered with OK."""
    wanted = f'grpc_server_requests_total{{code="OK",handler="{method}",service="mnemosynerpc.SessionManager"'
    pages = [daemon.http("/metrics")[1] for daemon in daemons]
    lines = [line for page in pages for line in page.splitlines() if line.startswith(wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def checked(daemons: Sequence[Daemon], method: str, run: Callable[[], Outcome]) -> Outcome:
    """Run a load of one method, all of whose calls must have been OK by the counters of the daemons."""
    before = ok_calls(daemons, method)
    outcome = run()
    answered = ok_calls(daemons, method) - before
    assert answered == len(outcome.latencies_s), f"{len(outcome.latencies_s)} calls, {answered:.0f} OK"
    return outcome


def rss_kb(pid: int) -> int:
    (line,) = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1])


def _wait_for(address: str) -> None:
    end_s = time.monotonic() + 10
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end_s, "the echo does not start"
            time.sleep(0.02)
        else:
            return
