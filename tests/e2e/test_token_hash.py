"""Tokens at rest, as operators turn them on: nobody is logged out, and no token is left in the table."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import asyncpg
import grpc
import pytest
from clusters import Cluster, Load, until
from mnemosynerpc.session_pb2 import DeleteRequest, GetRequest, ListRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned
from secrecy import CANARY

KEY, NEXT_KEY = f"{CANARY}-the-key-of-these-tests-of-tokens", f"{CANARY}-the-next-key-of-these-tests"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "token.key"
    path.write_text(f"{KEY}\n")
    return path


async def table(dsn: str) -> list[bytes]:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT access_token FROM mnemosyne.session")
    await connection.close()
    return [row["access_token"] for row in rows]


def start(stub: SessionManagerStub, count: int) -> list[str]:
    request = StartRequest(session=Session(subject_id="s"))
    return [stub.Start(request, timeout=5).session.access_token for _ in range(count)]


def all_are_there(stub: SessionManagerStub, tokens: list[str]) -> bool:
    got = [stub.Get(GetRequest(access_token=token), timeout=5).session.access_token for token in tokens]
    return got == tokens


def is_there(stub: SessionManagerStub, token: str) -> bool:
    try:
        return all_are_there(stub, [token])
    except grpc.RpcError as exc:
        assert exc.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]  # noqa: PT017  # the answer is looked at
        return False


async def test_sessions_from_before_live_on_and_no_token_stays_in_the_table(
    postgres_dsn: str, key_file: Path
) -> None:
    address = f"-postgres.address={postgres_dsn}"
    flags = [address, "-token.protection=hmac", f"-token.key.file={key_file}"]
    with Daemon(address) as daemon, daemon.serving().stub() as stub:
        before = start(stub, 5)
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        after = start(stub, 2)
        assert all_are_there(stub, [*before[:2], *after])
        assert sorted(await table(postgres_dsn))[-3:] == sorted(token.encode() for token in before[2:])

        code, out, err = await asyncio.to_thread(mnemosyned, "migrate", *flags)
        assert (code, err) == (0, "")
        assert out == "3 sessions were stored under their tokens, and are hashed now\n"
        kept = b"".join(await table(postgres_dsn))
        assert not any(token.encode() in kept for token in before + after)
        assert all_are_there(stub, before + after)

        handles = [session.access_token for session in stub.List(ListRequest(limit=9), timeout=5).sessions]
        assert not set(handles) & set(before + after)
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            stub.Get(GetRequest(access_token=handles[0]), timeout=5)
        assert stub.Delete(DeleteRequest(access_token=handles[0]), timeout=5).value == 1
        assert len(await table(postgres_dsn)) == 6
        # All were in the cache, by their tokens.
        assert sum(is_there(stub, token) for token in before + after) == 6
        assert stub.Delete(DeleteRequest(subject_id="s"), timeout=5).value == 6
        assert not any(is_there(stub, token) for token in before + after)


def test_a_node_that_does_not_know_the_key_says_so(postgres_dsn: str, key_file: Path) -> None:
    address = f"-postgres.address={postgres_dsn}"
    with Daemon(address, "-token.protection=hmac", f"-token.key.file={key_file}") as daemon:
        with daemon.serving().stub() as stub:
            tokens = start(stub, 1)
        key_file.write_text(f"{NEXT_KEY}\n{KEY}\n")
        code, out, _ = mnemosyned("migrate", address, "-token.protection=hmac", f"-token.key.file={key_file}")
        assert code == 0
        assert "some sessions are hashed with another key" in out
    key_file.write_text(f"{NEXT_KEY}\n")
    for flags in (["-token.protection=hmac", f"-token.key.file={key_file}"], []):
        with Daemon(address, *flags) as daemon, daemon.serving().stub() as stub:
            asyncio.run(until(lambda: "tokens_by_unknown_keys" in daemon.log))
            (line,) = (line for line in daemon.lines if "tokens_by_unknown_keys" in line)
            assert len(json.loads(line)["key_ids"]) == 1
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                all_are_there(stub, tokens)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-token.protection=hmac"], "flag -token.protection: hmac needs -token.key.file"),
        (["-token.key.file=/nowhere"], "flag -token.key.file: /nowhere: No such file or directory"),
        ([], "migrate needs -token.protection=hmac"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags: list[str], complaint: str) -> None:
    code, out, err = mnemosyned("migrate", *flags)

    assert (code, out, err) == (2, "", f"mnemosyned: {complaint}\n")


def test_a_migration_that_reaches_no_storage_says_so(key_file: Path) -> None:
    flags = ["-token.protection=hmac", f"-token.key.file={key_file}"]
    code, out, err = mnemosyned("migrate", "-postgres.address=postgres://u@127.0.0.1:9/d", *flags)

    assert (code, out) == (1, "")
    logged, complaint = err.splitlines()
    assert json.loads(logged)["msg"] == "storage_failed"
    assert complaint == "mnemosyned: storage: unavailable"


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_it_is_turned_on_and_its_key_changed_in_a_cluster_without_a_failed_call(
    postgres_dsn: str, tmp_path: Path
) -> None:
    paths = {name: tmp_path / name for name in ("key", "key-next", "next-key", "next")}
    for name, keys in (
        ("key", [KEY]),
        ("key-next", [KEY, NEXT_KEY]),
        ("next-key", [NEXT_KEY, KEY]),
    ):
        paths[name].write_text("\n".join(keys))
    on = "-token.protection=hmac"
    steps = [
        [f"-token.key.file={paths['key']}"],
        [on, f"-token.key.file={paths['key']}"],
        [on, f"-token.key.file={paths['key-next']}"],
        [on, f"-token.key.file={paths['next-key']}"],
    ]
    with Cluster(postgres_dsn, 3) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        async with Load(cluster.addresses(cluster.names), rate=300.0, watches_health=True) as load:
            for flags in steps:
                for name in cluster.names:
                    assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
                    await asyncio.to_thread(cluster.launch(name, *flags).serving)
                    await cluster.rings_equal(cluster.names)
            migrate = ["migrate", f"-postgres.address={postgres_dsn}", *steps[-1]]
            code, *_ = await asyncio.to_thread(mnemosyned, *migrate)
            assert code == 0

        assert not load.outcome.failures, load.outcome.report
        assert len(load.outcome.calls) > 1000
        assert all(name.startswith(b"\0") for name in await table(postgres_dsn))
