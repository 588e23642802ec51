"""What an attack gets: daemons on loopback, and a good client of each; and what is asked of them afterwards.

An attack is a function of a Lab. It returns if the daemon held, and raises Broken if it did not. The Lab then
asks of every daemon what holds in any attack:

- The good client's p99 is under 50 ms, and none of its calls failed.
- The daemon's memory never was over 512 MB.
- The daemon runs, unless the attack says that it may end. Its log has no traceback and no secret.

Attacks know what a stranger knows: addresses, the public protos, and what nodes send to it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Self

import grpc
from clusters import SECRET, Cluster, free_ports
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned
from redteam.good_client import GoodClient, Report
from secrecy import CANARY, take_leaks

SERVICE: Final = "mnemosynerpc.SessionManager"
MAX_P99_MS: Final = 50.0
MAX_RSS_MB: Final = 512
ENGINES: Final = ("h2", "grpcio")
# Of every session that an attack must not read, forge or end.
SUBJECT: Final = f"{CANARY}-victim"
_RING_S: Final = 20.0
_START_S: Final = 30.0


class Broken(AssertionError):
    """A promise did not hold."""


class Void(AssertionError):
    """The attack did not reach what it attacks, so that nothing was shown."""


def require(condition: object, text: str) -> None:
    """Raise Broken with the text unless the condition holds."""
    if not condition:
        raise Broken(text)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack; `run` raises Broken if the daemon does not hold."""

    kind: str
    name: str
    run: Callable[[Lab], None]
    quick_on: tuple[str, ...] = ()  # the engines on which the short form runs it
    engines: tuple[str, ...] = ENGINES
    needs: Callable[[], str] = str  # says what this machine lacks for it; empty if nothing


ATTACKS: Final[list[Attack]] = []


def attack(
    kind: str,
    name: str,
    *,
    quick_on: tuple[str, ...] = (),
    engines: tuple[str, ...] = ENGINES,
    needs: Callable[[], str] = str,
) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Register an attack."""

    def register(run: Callable[[Lab], None]) -> Callable[[Lab], None]:
        ATTACKS.append(Attack(kind=kind, name=name, run=run, quick_on=quick_on, engines=engines, needs=needs))
        return run

    return register


@dataclass(kw_only=True)
class Watched:
    """A daemon with its good clients."""

    daemon: Daemon
    clients: list[GoodClient]
    may_end: bool = False


@dataclass(kw_only=True)
class Outcome:
    """What one attack came to."""

    verdict: str  # held, broken or void
    reasons: list[str] = field(default_factory=list)
    p99_ms: float = 0.0
    failed: int = 0
    rss_mb: int = 0


class Lab:
    """Daemons of one engine for one attack."""

    def __init__(
        self, engine: str, new_database: Callable[[], str], scratch: Path, *, least_s: float = 3.0
    ) -> None:
        """`new_database` makes an empty database and returns its address.

        A good client is watched for `least_s` at least: fewer calls have no 99th percentile.
        """
        self._least_s = least_s
        self.engine = engine
        self.is_ours = engine == "h2"  # the engine of this project, whose bounds are its own
        self.scratch = scratch
        self.dsn = ""  # of the last node with PostgreSQL
        self.credentials: grpc.ChannelCredentials | None = None  # with which clients dial
        self._new_database = new_database
        self._stack = ExitStack()
        self._watched: list[Watched] = []
        self._watched_since_s = 0.0  # when the last good client began

    def __enter__(self) -> Self:
        take_leaks()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]  # as it came

    def node(self, *flags: str, storage: str = "memory", watches: bool = True, **options: Any) -> Daemon:  # noqa: ANN401  # those of Daemon
        """Start a daemon without a cluster, with a good client."""
        if storage == "postgres":
            self.dsn = self._new_database()
            flags = (f"-postgres.address={self.dsn}", *flags)
        (port,) = free_ports(1)
        own = (f"-grpc.engine={self.engine}", f"-storage={storage}", f"-port={port}")
        daemon = self._stack.enter_context(Daemon(*own, *flags, **options))
        # Not by a line of the log: its form is another one with -log.environment=development.
        daemon.address, daemon.admin = f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
        if not wait_until(lambda: _is_ready(daemon), _START_S):
            raise Void(f"the daemon does not start: {daemon.log[-1000:]}")
        _prefer(daemon)
        self._watched.append(Watched(daemon=daemon, clients=[]))
        if watches:
            self.watch(daemon)
        return daemon

    def cluster(self, names: Sequence[str] | int, *flags: str, secret: str = SECRET) -> Cluster:
        """Prepare a cluster; `launch` starts its nodes."""
        dsn = self._new_database()
        cluster = Cluster(dsn, names, f"-grpc.engine={self.engine}", *flags, secret=secret)
        return self._stack.enter_context(cluster)

    def launch(self, cluster: Cluster, name: str, *flags: str, **options: Any) -> Daemon:  # noqa: ANN401  # those of launch
        """Start one node of a cluster, and wait until it serves; `watch` gives it a good client."""
        daemon = cluster.launch(name, *flags, **options).serving()
        _prefer(daemon)
        self._watched.append(Watched(daemon=daemon, clients=[]))
        return daemon

    def enter(self, context: Any) -> Any:  # noqa: ANN401  # any context manager
        """Enter what is to end with this attack."""
        return self._stack.enter_context(context)

    @contextmanager
    def stub(self, daemon: Daemon) -> Iterator[SessionManagerStub]:
        """Lend a client, over TLS if the daemons of this lab have it."""
        if self.credentials is None:
            with daemon.stub() as stub:
                yield stub
            return
        with grpc.secure_channel(daemon.address, self.credentials) as channel:
            yield SessionManagerStub(channel)

    def watch(self, daemon: Daemon, *, starts: bool = False) -> str:
        """Give a daemon a good client that reads a session of its own cache; return that session's token.

        With `starts`, another client starts sessions as well.
        """
        token = own_session(daemon)
        wanted = SUBJECT.encode()
        message = GetRequest(access_token=token).SerializeToString()
        (watched,) = (one for one in self._watched if one.daemon is daemon)
        self._add(watched, GoodClient(daemon.address, f"/{SERVICE}/Get", message, wanted=wanted))
        if starts:
            message = StartRequest(session=Session(subject_id=SUBJECT)).SerializeToString()
            client = GoodClient(daemon.address, f"/{SERVICE}/Start", message, wanted=wanted, every_ms=20.0)
            self._add(watched, client)
        return token

    def _add(self, watched: Watched, client: GoodClient) -> None:
        self._watched_since_s = time.monotonic()
        watched.clients.append(self._stack.enter_context(client))

    def may_end(self, daemon: Daemon) -> None:
        """Allow that this daemon has ended: the attack, or the test, ends it on purpose."""
        for one in self._watched:
            if one.daemon is daemon:
                one.may_end = True

    def outcome(self, *, verdict: str = "held", reason: str = "") -> Outcome:
        """Ask of all daemons what holds in any attack; call it once, at the end."""
        outcome = Outcome(verdict=verdict, reasons=[reason] if reason else [])
        if verdict == "held":
            time.sleep(max(0.0, self._watched_since_s + self._least_s - time.monotonic()))
        for one in self._watched:
            for client in one.clients:
                _take_report(outcome, client.report())
            _take_daemon(outcome, one)
        leaks = take_leaks()
        if leaks:
            outcome.reasons.append(f"{len(leaks)} secrets in outputs, as in: {leaks[0][:300]}")
        if outcome.reasons and outcome.verdict == "held":
            outcome.verdict = "broken"
        return outcome


def _is_ready(daemon: Daemon) -> bool:
    if daemon.process.poll() is not None:
        raise Void(f"the daemon has ended: {daemon.log[-1000:]}")
    with suppress(OSError):
        return daemon.http("/healthr")[0] == HTTPStatus.OK
    return False


def _prefer(daemon: Daemon) -> None:
    with suppress(PermissionError, ProcessLookupError):
        # An attacker has a machine of its own. Here it shares the cores with the daemon.
        os.setpriority(os.PRIO_PROCESS, daemon.process.pid, -5)


def _take_report(outcome: Outcome, report: Report) -> None:
    outcome.p99_ms = max(outcome.p99_ms, report.p99_ms)
    outcome.failed += report.failed
    if report.failed:
        outcome.reasons.append(f"the good client failed {report.failed} times: {report.failures}")
    if report.p99_ms >= MAX_P99_MS:
        outcome.reasons.append(f"the good client's p99 is {report.p99_ms} ms")
    if not report.calls and outcome.verdict == "held":
        outcome.reasons.append("the good client got no answer")


def _take_daemon(outcome: Outcome, one: Watched) -> None:
    code = one.daemon.process.poll()
    if code is None:
        rss_mb = peak_rss_mb(one.daemon)
        outcome.rss_mb = max(outcome.rss_mb, rss_mb)
        if rss_mb >= MAX_RSS_MB:
            outcome.reasons.append(f"the daemon took {rss_mb} MB")
    elif not one.may_end:
        outcome.reasons.append(f"the daemon has ended with code {code}")
    if "Traceback" in one.daemon.log:
        at = one.daemon.log.index("Traceback")
        outcome.reasons.append(f"a traceback in the log: {one.daemon.log[max(0, at - 200) : at + 600]}")


def peak_rss_mb(daemon: Daemon) -> int:
    """Return the most memory that a daemon ever had."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) // 1024


def own_session(daemon: Daemon) -> str:
    """Start a session that this daemon owns, and have it cached there; return its token."""
    with daemon.stub() as stub:
        for _ in range(200):
            token = start(stub)
            status, page = daemon.http(f"/debug/cluster?token={token}")
            if status != 200 or _is_owner(daemon, page):
                break
        stub.Get(GetRequest(access_token=token), timeout=5)
    return token


def _is_owner(daemon: Daemon, page: str) -> bool:
    owner = re.search(r'"owner": "([^"]*)"', page)
    node = re.search(r'"node": "([^"]*)"', daemon.http("/debug/cluster")[1])
    return owner is None or node is None or owner[1] == node[1]


def start(stub: SessionManagerStub, subject: str = SUBJECT, **fields: Any) -> str:  # noqa: ANN401  # a Session's
    """Start a session; return its token."""
    session = Session(subject_id=subject, bag={"k": CANARY}, **fields)
    return str(stub.Start(StartRequest(session=session), timeout=5).session.access_token)


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Return the status of a failed call."""
    code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]  # a Call as well
    return code


def metric(daemon: Daemon, pattern: str) -> float:
    """Return the sum of the series that match."""
    _, text = daemon.http("/metrics")
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#") and re.search(pattern, line)
    )


def wait_until(is_met: Callable[[], bool], within_s: float) -> bool:
    """Wait for a condition; tell whether it was met in time."""
    end_s = time.monotonic() + within_s
    while not is_met():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def rings_are(cluster: Cluster, names: Sequence[str], on: Sequence[str], within_s: float = _RING_S) -> bool:
    """Wait until these nodes all route by exactly these names."""
    wanted = sorted(names)
    return wait_until(
        lambda: all(sorted(cluster.page(name)["ring"]["nodes"]) == wanted for name in on), within_s
    )


def known_flags() -> str:
    """Return the text of -help: attacks use a flag if this build has it."""
    return mnemosyned("-help")[1]


def address_pair() -> tuple[str, int]:
    """Return a free address whose next port, for the admin port, is free too; and its port."""
    (port,) = free_ports(1)
    return f"127.0.0.1:{port}", port
