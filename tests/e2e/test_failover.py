"""A primary that is killed under load, the standby in its place, and the former primary that comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from clusters import Cluster, until
from faults.checker import LATE_BY_S, check
from faults.history import Kind, Operation, Outcome
from faults.recorder import Recorder
from mnemosynerpc.session_pb2 import AbandonRequest, ExistsRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import code_of
from processes import Daemon
from replicas import Replicas, comes_back, execute, kill, promote, replicas, rewind, until_true

from mnemosyned.embedded.server import EmbeddedPostgres

pytestmark = pytest.mark.timeout(150)

# Longer than any call takes that is answered at all, so that none ends by its deadline.
PATIENCE_S: Final = 8.0
# How long after the promotion a call may still fail. README.md and docs/storage.md state it.
BOUND_S: Final = 2.0
OUTAGE_S: Final = 2.0
STATE: Final = (
    "SELECT (SELECT md5(string_agg(s::text, ',' ORDER BY access_token)) FROM mnemosyne.session AS s) "
    "|| (SELECT string_agg(n::text, ',' ORDER BY name) FROM mnemosyne.session_node AS n)"
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Replicas]:
    with replicas(tmp_path) as both:
        yield both


@pytest.fixture
def cluster(pair: Replicas) -> Iterator[Cluster]:
    """Two nodes, and a third one that no test has started yet."""
    execute(pair.primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
    url = pair.url(pair.primary, pair.standby, query="?target_session_attrs=read-write")
    with Cluster(url, 3) as nodes:
        nodes.start(nodes.names[:2])
        yield nodes


def recorder_of(cluster: Cluster, names: list[str]) -> Recorder:
    recorder = Recorder(seed=1, rate=200.0, timeouts_s=(PATIENCE_S,))
    for name in names:
        recorder.add(name, cluster.daemons[name].address, None)
    return recorder


def failed(operations: list[Operation]) -> list[Operation]:
    return [one for one in operations if one.outcome in {Outcome.MAYBE, Outcome.UNSENT}]


def count_of(daemon: Daemon, metric: str) -> float:
    _, text = daemon.http("/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(metric))


@pytest.mark.slow
async def test_a_failover_under_load_loses_nothing_that_was_acknowledged_and_revives_nothing(
    pair: Replicas, cluster: Cluster
) -> None:
    names = cluster.names[:2]
    daemons = [cluster.daemons[name] for name in names]
    await cluster.rings_equal(names, on=names)
    await until(lambda: all(count_of(one, "mnemosyned_lease_valid") for one in daemons))
    async with recorder_of(cluster, names) as recorder:
        await until(lambda: len(recorder.operations) > 500)
        assert failed(recorder.operations) == []

        kill(pair.primary)
        killed_s = time.monotonic()
        # What those take that promote a standby by themselves.
        await until(lambda: time.monotonic() > killed_s + OUTAGE_S)
        await asyncio.to_thread(promote, pair.standby)
        promoted_s = time.monotonic()

        await until(lambda: _has_written_since(recorder, promoted_s, 100))
        await recorder.stop()
        # A failed write may be done until its deadline.
        await until(lambda: time.monotonic() > _last_deadline_s(recorder) + LATE_BY_S)
        await recorder.look_at_all(names)

    failures = failed(recorder.operations)
    assert {one.error.partition(" ")[0] for one in failures} == {"UNAVAILABLE"}
    assert min(one.ended_s for one in failures) >= killed_s
    assert max(one.ended_s for one in failures) < promoted_s + BOUND_S
    assert [str(finding) for finding in check(recorder.operations)] == []
    # The copies of before, which were leased in a store that is no more.
    for daemon in daemons:
        # On a busy machine a renewal may have been late just now.
        await until(lambda daemon=daemon: count_of(daemon, "mnemosyned_lease_valid") == 1)
        assert count_of(daemon, 'mnemosyned_lease_drops_total{reason="replaced"}') == 1
        assert _lines_of_the_worst_second(daemon) < 100


def _has_written_since(recorder: Recorder, since_s: float, count: int) -> bool:
    done = [one for one in recorder.operations if one.kind is Kind.SET and one.outcome is Outcome.DONE]
    return sum(one.began_s > since_s for one in done) > count


def _last_deadline_s(recorder: Recorder) -> float:
    return max(one.deadline_s for one in failed(recorder.operations))


def _lines_of_the_worst_second(daemon: Daemon) -> int:
    seconds = Counter(line["ts"][:19] for line in _log(daemon))
    return max(seconds.values())


async def test_the_log_of_an_outage_is_short_and_counts_what_it_leaves_out(pair: Replicas) -> None:
    with Daemon(f"-postgres.address={pair.primary.dsn}") as daemon:
        await asyncio.to_thread(daemon.serving)
        started(daemon)
        kill(pair.primary)
        begun_s = time.monotonic()
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            stub: Any = SessionManagerStub(channel)
            failures = sum(await asyncio.gather(*(_failures_for(1.5, stub) for _ in range(16))))
        took_s = time.monotonic() - begun_s
        # The rest is told when no line has told it for a second.
        await until(lambda: _told_failures(daemon) == failures)

        events = Counter(line["msg"] for line in _log(daemon))
        assert failures > 300
        # Ten a second and one more, since a second begins with a line.
        assert events["rpc_failed"] <= 10 * (took_s + 1)
        assert events["storage_failed"] <= 4


async def _failures_for(seconds: float, stub: Any) -> int:  # noqa: ANN401  # grpc.aio types it for the synchronous API
    """Call until the time is over, at once after each failure."""
    end_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        try:
            await stub.Get(GetRequest(access_token="no token"), timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017  # the loop goes on
            count += 1
    return count


def _log(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.lines if line.startswith("{")]


def _told_failures(daemon: Daemon) -> int:
    lines = _log(daemon)
    written = sum(line["msg"] == "rpc_failed" for line in lines)
    return written + sum(line.get("left_out", 0) for line in lines if line["msg"].startswith("rpc_failed"))


@pytest.mark.slow
async def test_a_former_primary_that_comes_back_is_neither_written_to_nor_read_from(
    pair: Replicas, cluster: Cluster
) -> None:
    former, primary = pair.primary, pair.standby
    first, second, third = cluster.names
    await cluster.rings_equal([first, second], on=[first, second])
    tokens = [started(cluster.daemons[first]) for _ in range(20)]
    kill(former)
    promote(primary)
    await until(lambda: code_of(lambda: started(cluster.daemons[first])) is grpc.StatusCode.OK)
    for token in tokens[:10]:
        ended(cluster.daemons[first], token)

    # It has no standby any more, takes writes, and has the sessions that were ended.
    comes_back(former)
    before = execute(former.dsn, STATE)
    # A node that has used none of them yet takes the later one, though it is the second in the address.
    await asyncio.to_thread(cluster.start, [third])
    assert code_of(lambda: started(cluster.daemons[third])) is grpc.StatusCode.OK
    # Nor does a node go there that loses the primary.
    kill(primary)
    for name in cluster.names:
        await until(lambda: not is_ready(cluster.daemons[name]))  # noqa: B023  # it is over in this round
        codes = {code_of(lambda: read(cluster.daemons[name], token)) for token in tokens}  # noqa: B023
        assert codes == {grpc.StatusCode.UNAVAILABLE}
        line = await asyncio.to_thread(cluster.daemons[name].wait_for, "former_primary_not_used")
        assert (line["server"], line["timeline"], line["used"]) == (f"127.0.0.1:{former.port}", 1, 2)
    assert execute(former.dsn, STATE) == before

    primary.restart()
    for name in cluster.names:
        await until(lambda: is_ready(cluster.daemons[name]))  # noqa: B023
        assert [exists(cluster.daemons[name], token) for token in tokens] == [False] * 10 + [True] * 10
    assert execute(former.dsn, STATE) == before


@pytest.mark.slow
async def test_a_rewound_primary_is_a_standby_and_the_next_primary(pair: Replicas, cluster: Cluster) -> None:
    names = cluster.names[:2]
    daemon = cluster.daemons[names[0]]
    await cluster.rings_equal(names, on=names)
    kill(pair.primary)
    promote(pair.standby)
    await until(lambda: code_of(lambda: started(daemon)) is grpc.StatusCode.OK)
    rewind(pair.primary, pair.standby)
    token = started(daemon)
    until_true(pair.standby.dsn, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
    until_true(pair.primary.dsn, f"SELECT count(*) = 1 FROM mnemosyne.session WHERE access_token = '{token}'")  # noqa: S608  # its own token

    kill(pair.standby)
    promote(pair.primary)

    await until(lambda: code_of(lambda: started(daemon)) is grpc.StatusCode.OK)
    assert exists(daemon, token)
    await until(lambda: is_ready(daemon))


@pytest.mark.slow
async def test_a_primary_that_has_lost_its_standby_is_left_for_the_one_that_was_promoted(
    pair: Replicas, cluster: Cluster
) -> None:
    names = cluster.names[:2]
    daemons = [cluster.daemons[name] for name in names]
    await cluster.rings_equal(names, on=names)
    token = started(daemons[0])

    # As behind a partition: it runs on, and its commits wait for a standby that follows no more.
    promote(pair.standby)

    for daemon in daemons:
        line = await asyncio.to_thread(daemon.wait_for, "later_primary_found")
        assert f"127.0.0.1:{pair.standby.port}" in line["server"]
        await until(lambda: code_of(lambda: started(daemon)) is grpc.StatusCode.OK)  # noqa: B023
        assert exists(daemon, token)
    await until(lambda: execute(pair.primary.dsn, BACKENDS)[0][0] == 0)


@pytest.mark.slow
def test_a_server_that_refuses_the_user_does_not_matter_where_another_takes_writes(tmp_path: Path) -> None:
    with (
        EmbeddedPostgres.start(tmp_path / "one") as one,
        EmbeddedPostgres.start(tmp_path / "stranger") as stranger,
        # Both are looked at, since no timeline is known yet; the stranger has another password.
        Daemon(f"-postgres.address={Replicas(one, stranger).url(one, stranger)}") as daemon,
    ):
        daemon.serving()
        assert started(daemon)


# A commit that waits for a standby does not notice that its client is gone.
BACKENDS: Final = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE application_name = 'mnemosyned' AND wait_event IS DISTINCT FROM 'SyncRep'"
)


def started(daemon: Daemon) -> str:
    with daemon.stub() as stub:
        request = StartRequest(session=Session(subject_id="s"))
        return str(stub.Start(request, timeout=PATIENCE_S).session.access_token)


def ended(daemon: Daemon, token: str) -> None:
    with daemon.stub() as stub:
        stub.Abandon(AbandonRequest(access_token=token), timeout=PATIENCE_S)


def read(daemon: Daemon, token: str) -> None:
    with daemon.stub() as stub:
        stub.Get(GetRequest(access_token=token), timeout=PATIENCE_S)


def exists(daemon: Daemon, token: str) -> bool:
    with daemon.stub() as stub:
        return bool(stub.Exists(ExistsRequest(access_token=token), timeout=PATIENCE_S).value)


def is_ready(daemon: Daemon) -> bool:
    return daemon.http("/healthr")[0] == 200
