"""PostgreSQL as people have it: encryption, ways to log in, settings, limits, and networks that lie."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from certificates import Authority
from conftest import PASSWORD
from prometheus_client import CollectorRegistry
from secrecy import CANARY
from stores import lookups, new

from mnemosyned.embedded.server import EmbeddedPostgres
from mnemosyned.errors import InvalidArgument, StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.security.file_reloader import FileReloader
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres import connector
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.build import build
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")


def store_on(dsn: str, *, pool_size: int = 8, timeout_s: float = 3.0) -> PostgresStore:
    options = PostgresOptions(
        dsn=dsn, pool_size=pool_size, connect_timeout_s=2.0, statement_timeout_s=timeout_s, environ={}
    )
    return PostgresStore(PostgresPool(options, QueryMetrics(CollectorRegistry())), TABLE)


@asynccontextmanager
async def opened(dsn: str, **options: float) -> AsyncIterator[PostgresStore]:
    store = store_on(dsn, **options)  # type: ignore[arg-type]
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def execute(dsn: str, *statements: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn, ssl=False)
    try:
        rows = [await connection.fetch(statement) for statement in statements]
        return list(rows[-1])
    finally:
        await connection.close()


async def works(store: PostgresStore) -> None:
    (started,) = await store.start([new(subject_id="s")])
    assert isinstance(started, Session)
    (found,) = await store.load(lookups(started.access_token))
    assert isinstance(found, Session)
    assert found.expires_at_us == started.expires_at_us
    (is_live,) = await store.exist([started.access_token])
    assert is_live is True


# Encryption, and ways to log in.


@dataclass
class TlsServer:
    server: EmbeddedPostgres
    authority: Authority
    directory: Path  # the certificates

    @property
    def dsn(self) -> str:
        parts = urlsplit(self.server.dsn)
        return parts._replace(netloc=f"caller:{PASSWORD}@localhost:{parts.port}").geturl()

    async def allow(self, *lines: str) -> None:
        """Write pg_hba.conf; the first line that fits decides."""
        # The tests' own connections are without TLS, to the address.
        hba = self.server.directory / "data" / "pg_hba.conf"
        given = lines or ("host all caller all scram-sha-256",)
        hba.write_text("\n".join([*given, "hostnossl all mnemosyne all scram-sha-256"]) + "\n")
        await self.reload()

    async def reload(self) -> None:
        loaded = "SELECT pg_conf_load_time() AS at"
        before = (await execute(self.server.dsn, loaded))[0]["at"]
        await execute(self.server.dsn, "SELECT pg_reload_conf()")
        async with asyncio.timeout(10):
            # A new connection has what the server has read.
            while (await execute(self.server.dsn, loaded))[0]["at"] <= before:
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory)
    issued = authority.issue("localhost")
    (issued / "key.pem").chmod(0o600)
    with EmbeddedPostgres.start(directory / "pg") as server:

        async def turn_on() -> None:
            await execute(
                server.dsn,
                f"ALTER SYSTEM SET ssl_cert_file = '{issued}/crt.pem'",
                f"ALTER SYSTEM SET ssl_key_file = '{issued}/key.pem'",
                f"ALTER SYSTEM SET ssl_ca_file = '{authority.path}'",
                "ALTER SYSTEM SET ssl = on",
                f"CREATE ROLE caller SUPERUSER LOGIN PASSWORD '{PASSWORD}'",
                "SET password_encryption = 'md5'",
                f"CREATE ROLE old SUPERUSER LOGIN PASSWORD '{PASSWORD}'",
                "SELECT pg_reload_conf()",
            )

        asyncio.run(turn_on())
        yield TlsServer(server, authority, directory)


async def encryption(store: PostgresStore) -> bool:
    async with store._pool.connection() as connection:
        return bool(await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))


@pytest.mark.parametrize(
    ("parameters", "is_encrypted"),
    [
        ("", True),
        ("sslmode=disable", False),
        ("sslmode=allow", False),
        ("sslmode=prefer", True),
        ("sslmode=require", True),
        ("sslmode=verify-ca&sslrootcert={ca}", True),
        ("sslmode=verify-full&sslrootcert={ca}", True),
        # The address that is dialed is none of the certificate's names.
        ("sslmode=verify-full&sslrootcert={ca}&hostaddr=127.0.0.1", True),
        ("sslmode=verify-full&sslrootcert={ca}&sslsni=0", True),
        ("sslmode=require&ssl_min_protocol_version=TLSv1.3", True),
    ],
)
async def test_each_mode_of_tls_does_what_it_says(
    tls_server: TlsServer,
    parameters: str,
    is_encrypted: bool,  # noqa: FBT001
) -> None:
    await tls_server.allow()
    async with opened(
        f"{tls_server.dsn}?{parameters.replace('{ca}', str(tls_server.authority.path))}"
    ) as store:
        assert await encryption(store) is is_encrypted
        await works(store)


@pytest.mark.parametrize(
    ("host", "parameters", "words"),
    [
        ("localhost", "sslmode=verify-full&sslrootcert={other}", "TLS: the server's certificate: "),
        ("127.0.0.1", "sslmode=verify-full&sslrootcert={ca}", "IP address mismatch"),
        ("localhost", "sslrootcert=system", "TLS: the server's certificate: "),
    ],
)
async def test_a_server_that_cannot_be_verified_is_named_and_why(
    tls_server: TlsServer, host: str, parameters: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    await tls_server.allow()
    other = Authority(tls_server.directory / "other").path
    given = parameters.replace("{ca}", str(tls_server.authority.path)).replace("{other}", str(other))
    store = store_on(f"{tls_server.dsn.replace('localhost', host)}?{given}")
    with pytest.raises(StorageUnavailable) as caught:
        await store.open()

    assert words in caught.value.detail
    assert "sslrootcert" in caught.value.hint
    (record,) = [one for one in caplog.records if one.message == "storage_failed"]
    assert record.server == f"{host}:{tls_server.server.port}"  # type: ignore[attr-defined]


async def test_a_server_without_tls_is_said_to_have_none(postgres_dsn: str) -> None:
    with pytest.raises(StorageUnavailable) as caught:
        await store_on(f"{postgres_dsn}?sslmode=require").open()

    assert "TLS: the server has none" in caught.value.detail


async def test_prefer_and_allow_try_the_other_way_if_the_server_wants_it(tls_server: TlsServer) -> None:
    await tls_server.allow("hostnossl all caller all scram-sha-256")
    async with opened(f"{tls_server.dsn}?sslmode=prefer") as store:
        assert not await encryption(store)
    await tls_server.allow("hostssl all caller all scram-sha-256")
    async with opened(f"{tls_server.dsn}?sslmode=allow") as store:
        assert await encryption(store)


async def test_a_new_client_certificate_is_shown_by_new_connections(tls_server: TlsServer) -> None:
    await tls_server.allow("hostssl all caller all scram-sha-256 clientcert=verify-ca")
    issued = tls_server.authority.issue("client.test", at="client")
    (issued / "key.pem").chmod(0o600)
    files = f"sslmode=require&sslcert={issued}/crt.pem&sslkey={issued}/key.pem"
    serial = "SELECT client_serial FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    async with opened(f"{tls_server.dsn}?{files}") as store, store._pool.connection() as one:
        first = await one.fetchval(serial)
        tls_server.authority.issue("client.test", at="client")
        async with store._pool.connection() as other:
            second = await other.fetchval(serial)
        # Half a replacement: what was valid before goes on.
        (issued / "key.pem").write_text("hunter2")
        async with store._pool.connection() as two, store._pool.connection() as three:
            assert await three.fetchval(serial) == await two.fetchval(serial) == second

    assert first != second


@pytest.mark.parametrize("method", ["trust", "md5", "scram-sha-256", "password"])
async def test_each_way_to_log_in_works(tls_server: TlsServer, method: str) -> None:
    await tls_server.allow(f"host all caller,old all {method}")
    # A password that the server has as md5 alone.
    old = tls_server.dsn.replace("caller:", "old:")
    for dsn in (tls_server.dsn, *([old] if method in {"md5", "password"} else [])):
        async with opened(dsn) as store:
            await works(store)


async def test_a_call_that_needs_a_connection_takes_a_new_password_from_the_file_at_once(
    postgres_dsn: str, tmp_path: Path
) -> None:
    name = f"rotated_{urlsplit(postgres_dsn).path[1:]}"
    first, second = f"{CANARY}-first", f"{CANARY}-second"
    await execute(postgres_dsn, f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{first}'")
    path = tmp_path / "address"
    path.write_text(with_login(postgres_dsn, name, first))
    # Nothing looks at the file once a second.
    file = FileReloader("postgres_address", [str(path)], path.read_text)
    config = PostgresConfig(
        address="",
        address_file=str(path),
        schema=TABLE.schema,
        table=TABLE.name,
        pool_size=6,
        connect_timeout_s=2.0,
        statement_timeout_s=3.0,
        binaries="",
    )
    store = build(config, dsn="", registry=CollectorRegistry(), environ={}, address=file)
    await store.open()
    path.write_text(with_login(postgres_dsn, name, second))
    await execute(postgres_dsn, f"ALTER ROLE {name} PASSWORD '{second}'")

    async with store._pool.connection():
        started = await asyncio.gather(*(store.start([new(subject_id="s")]) for _ in range(20)))
    await store.close()
    await execute(
        postgres_dsn, f"REASSIGN OWNED BY {name} TO tests", f"DROP OWNED BY {name}", f"DROP ROLE {name}"
    )

    assert all(isinstance(one, Session) for (one,) in started)


def with_login(dsn: str, user: str, password: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}").geturl()


async def test_a_connection_that_pg_hba_does_not_allow_ends_the_start_with_a_hint(
    tls_server: TlsServer,
) -> None:
    await tls_server.allow("host all caller all reject")
    with pytest.raises(StorageRefused) as caught:
        await store_on(f"{tls_server.dsn}?sslmode=require").open()

    assert "28000 invalid_authorization_specification" in str(caught.value)
    assert "pg_hba.conf" in str(caught.value)


# Settings of the server, the database and the role.


@pytest.mark.parametrize(
    "setting",
    [
        "bytea_output = 'escape'",
        "DateStyle = 'German, DMY'",
        "IntervalStyle = 'sql_standard'",
        "TimeZone = 'America/St_Johns'",
        "standard_conforming_strings = off",
        "search_path = 'pg_temp', 'nowhere'",
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "row_security = off",
        "statement_timeout = 50",
        "lock_timeout = 0",
        "idle_session_timeout = 2000",  # longer than a slow machine takes to set ours
        "idle_in_transaction_session_timeout = 1",
        "client_encoding = 'LATIN1'",
        "extra_float_digits = 0",
        "plan_cache_mode = 'force_custom_plan'",
        "array_nulls = off",
        "backslash_quote = off",
        "force_parallel_mode = on",
        "session_preload_libraries = 'auto_explain'",
    ],
)
async def test_a_setting_of_the_role_does_no_harm(postgres_dsn: str, setting: str) -> None:
    await execute(postgres_dsn, f"ALTER ROLE tests SET {setting}")
    try:
        async with opened(postgres_dsn) as store:
            await works(store)
            await asyncio.gather(*(works(store) for _ in range(16)))
    finally:
        await execute(postgres_dsn, f"ALTER ROLE tests RESET {setting.partition(' ')[0]}")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("options=-c%20nonsense%3D1", "42704 undefined_object"),
        ("options=--nonsense", "connect: 42"),
        ("role=nosuch", "its parameter role cannot be set: 22023 invalid_parameter_value"),
        ("search_path=x&work_mem=banana", "its parameter work_mem cannot be set: 22023"),
        ("log_min_messages=banana", "its parameter log_min_messages cannot be set: 22023"),
    ],
)
async def test_a_value_that_the_server_does_not_take_ends_the_start(
    postgres_dsn: str, parameters: str, words: str
) -> None:
    with pytest.raises(StorageRefused) as caught:
        await store_on(f"{postgres_dsn}?{parameters}").open()

    assert words in str(caught.value)


async def test_settings_of_the_address_are_set_and_ours_win(postgres_dsn: str) -> None:
    parameters = "application_name=a&work_mem=5MB&myapp.tenant=t&options=-c%20geqo%3Doff%20-c%20jit%3Don"
    dsn = f"{postgres_dsn}?{parameters}"
    async with opened(dsn) as store, store._pool.connection() as connection:
        names = ["application_name", "work_mem", "myapp.tenant", "geqo", "jit"]
        values = [await connection.fetchval("SELECT current_setting($1)", name) for name in names]

    assert values == ["a", "5MB", "t", "off", "off"]


async def test_acknowledged_writes_that_a_crash_can_lose_are_warned_of(
    postgres_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    await execute(postgres_dsn, "ALTER ROLE tests SET synchronous_commit = off")
    try:
        async with opened(postgres_dsn):
            (record,) = [one for one in caplog.records if one.message == "postgres_may_lose_sessions"]
        caplog.clear()
        async with opened(f"{postgres_dsn}?synchronous_commit=on"):
            assert "postgres_may_lose_sessions" not in caplog.text
    finally:
        await execute(postgres_dsn, "ALTER ROLE tests RESET synchronous_commit")

    assert record.setting == "synchronous_commit=off"  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_of_another_encoding_works_for_text_that_it_can_hold(
    postgres_dsn: str, encoding: str
) -> None:
    name = f"odd_{encoding.lower()}"
    await execute(postgres_dsn, f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    try:
        async with opened(urlsplit(postgres_dsn)._replace(path=f"/{name}").geturl()) as store:
            await works(store)
            good, bad = await store.start([new(subject_id="Zoë"), new(subject_id="→")])
            assert isinstance(good, Session)
            assert isinstance(bad, InvalidArgument if encoding == "LATIN1" else Session)
    finally:
        await execute(postgres_dsn, f"DROP DATABASE {name} WITH (FORCE)")


# Limits.


async def test_calls_wait_for_the_connections_there_are_when_the_server_has_no_more(
    postgres_dsn: str,
) -> None:
    await execute(postgres_dsn, f"CREATE ROLE few LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 3")
    parts = urlsplit(postgres_dsn)
    await execute(postgres_dsn, f'GRANT CREATE ON DATABASE "{parts.path[1:]}" TO few')
    dsn = parts._replace(netloc=f"few:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()
    try:
        async with opened(dsn, pool_size=16) as store:
            await asyncio.gather(*(store.now_us() for _ in range(200)))
        await execute(postgres_dsn, "ALTER ROLE few CONNECTION LIMIT 0")
        with pytest.raises(StorageUnavailable) as caught:
            await store_on(dsn).open()
        assert "53300 too_many_connections" in caught.value.detail
        assert "max_connections" in caught.value.hint
    finally:
        await execute(postgres_dsn, "DROP OWNED BY few CASCADE", "DROP ROLE few")


# Networks.


class Proxy:
    """Passes bytes on to the server, until it is told to lose those of the connections that it has."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._lost: set[asyncio.Event] = set()
        self._live: list[asyncio.Event] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def forget(self) -> None:
        """As a firewall does: what is sent on old connections disappears, and new ones work."""
        for lost in self._live:
            lost.set()
        self._live.clear()

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = asyncio.Event()
        self._live.append(lost)
        up, down = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, down]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if not lost.is_set():
                    target.write(data)
            if not lost.is_set():
                target.close()

        await asyncio.gather(copy(reader, down), copy(up, writer), return_exceptions=True)


async def test_after_one_call_without_an_answer_no_other_waits_for_a_connection_that_a_firewall_forgot(
    postgres_dsn: str,
) -> None:
    parts = urlsplit(postgres_dsn)
    assert parts.port is not None
    proxy = Proxy(parts.port)
    port = await proxy.start()
    dsn = parts._replace(netloc=f"tests:{PASSWORD}@127.0.0.1:{port}").geturl()
    try:
        async with opened(dsn, timeout_s=1) as store:
            await asyncio.gather(*(store._pool.fetch(store._queries.now) for _ in range(30)))
            assert store._pool._size() > 3
            proxy.forget()
            with pytest.raises(StorageUnavailable):
                await store.now_us()
            begun_s = asyncio.get_running_loop().time()
            for _ in range(20):
                await store.now_us()
            assert asyncio.get_running_loop().time() - begun_s < 1
    finally:
        await proxy.stop()


async def test_connections_are_kept_alive_as_the_address_says(postgres_dsn: str) -> None:
    options = {"keepalives_idle": socket.TCP_KEEPIDLE, "tcp_user_timeout": socket.TCP_USER_TIMEOUT}
    dsn = f"{postgres_dsn}?keepalives_idle=7&tcp_user_timeout=9000"
    async with opened(dsn) as store, store._pool.connection() as connection:
        found = connection._con._transport.get_extra_info("socket")  # type: ignore[attr-defined]
        kept = found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        values = {name: found.getsockopt(socket.IPPROTO_TCP, option) for name, option in options.items()}

    assert kept == 1
    assert values == {"keepalives_idle": 7, "tcp_user_timeout": 9000}


async def test_a_host_that_does_not_answer_leaves_time_for_the_next(
    postgres_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = urlsplit(postgres_dsn)
    # It takes connections and says nothing.
    with closing(socket.create_server(("127.0.0.1", 0))) as dead:
        hosts = f"127.0.0.1:{dead.getsockname()[1]},127.0.0.1:{parts.port}"
        async with opened(parts._replace(netloc=f"tests:{PASSWORD}@{hosts}").geturl()) as store:
            await works(store)
            # Further connections go to the host that answers first.
            begun_s = asyncio.get_running_loop().time()
            await asyncio.gather(*(store.now_us() for _ in range(20)))
            assert asyncio.get_running_loop().time() - begun_s < 1

    assert "storage_failed" not in caplog.text


async def test_an_address_of_a_name_that_does_not_answer_leaves_time_for_the_next(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = urlsplit(postgres_dsn)
    assert parts.port is not None

    async def look_up(_: object) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    monkeypatch.setattr(connector, "_look_up", look_up)
    with closing(socket.create_server(("127.0.0.2", parts.port))):
        async with opened(parts._replace(netloc=f"tests:{PASSWORD}@db.test:{parts.port}").geturl()) as store:
            await works(store)


async def test_what_was_tried_at_each_host_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(StorageUnavailable) as caught:
        await store_on("postgres://u:hunter2@127.0.0.1:9,does-not-exist.invalid:5/d").open()

    (record,) = [one for one in caplog.records if one.message == "storage_failed"]
    assert record.tried == (  # type: ignore[attr-defined]
        "127.0.0.1:9: connection refused; does-not-exist.invalid:5: the name of the host cannot be resolved"
    )
    assert caught.value.detail.startswith(
        "connect: the name of the host cannot be resolved (server 127.0.0.1:9"
    )


async def test_a_connection_that_an_administrator_ended_costs_no_call(postgres_dsn: str) -> None:
    async with opened(postgres_dsn) as store:
        await asyncio.gather(*(store.now_us() for _ in range(20)))
        await execute(
            postgres_dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mnemosyned'",
        )
        await asyncio.sleep(0.2)
        for _ in range(20):
            await store.now_us()
