"""The table dropped, replaced or changed under a running daemon: readiness tells, and it comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from grpc import StatusCode
from mnemosynerpc.session_pb2 import GetRequest, Session, SetValueRequest, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import code_of
from processes import Daemon
from replicas import execute
from waiting import until

TABLE = "mnemosyne.session"
# What is done to the table, and what the reason says. The SQL of the reason mends it.
BREAKING = {
    f"ALTER TABLE {TABLE} DROP CONSTRAINT session_pkey": "no primary key on access_token",
    f"ALTER TABLE {TABLE} DROP COLUMN subject_client": "column subject_client should be text, and is missing",
    f"ALTER TABLE {TABLE} RENAME bag TO bags": "column bag should be bytea, and is missing",
    f"ALTER TABLE {TABLE} ALTER bag TYPE text USING ''": "column bag should be bytea, and is text",
    f"ALTER TABLE {TABLE} ALTER expire_at TYPE timestamp": "and is timestamp without time zone",
    f"ALTER TABLE {TABLE} ADD tenant int NOT NULL DEFAULT 1; ALTER TABLE {TABLE} ALTER tenant DROP DEFAULT": (
        'column "tenant" is NOT NULL'
    ),
    f"ALTER TABLE {TABLE} ADD CONSTRAINT never CHECK (bag IS NULL) NOT VALID": "constraint never refuses",
    f"CREATE RULE nothing AS ON INSERT TO {TABLE} DO INSTEAD NOTHING": "rule nothing",
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$; "
    f"CREATE TRIGGER refuse BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION refuse()": "refuse",
}
INDEX = 'CREATE INDEX CONCURRENTLY ON "mnemosyne"."session" (subject_id)'
HARMLESS = (
    f"ALTER TABLE {TABLE} ADD COLUMN note text",
    f"ALTER TABLE {TABLE} ALTER subject_client TYPE varchar(900)",
    f"ALTER TABLE {TABLE} DROP COLUMN note",
    f"ALTER TABLE {TABLE} ALTER subject_client TYPE text",
    f"ANALYZE {TABLE}",
    f"VACUUM FULL {TABLE}",
    f"REINDEX TABLE {TABLE}",
)


def start(stub: SessionManagerStub) -> str:
    return str(stub.Start(StartRequest(session=Session(subject_id="s")), timeout=10).session.access_token)


class Tabled(Daemon):
    """A daemon whose copies would live for a minute."""

    def __init__(self, dsn: str) -> None:
        super().__init__(f"-postgres.address={dsn}", "-cache.ttl=1m", "-postgres.pool.size=4")

    @property
    def is_ready(self) -> bool:
        return self.http("/healthr")[0] == 200

    @property
    def reason(self) -> str:
        return str(json.loads(self.http("/healthr")[1])["probes"].get("reason", ""))


@pytest.fixture
def daemon(postgres_dsn: str) -> Iterator[Tabled]:
    with Tabled(postgres_dsn) as one:
        one.serving()
        until(lambda: one.is_ready)
        yield one


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_changed_table_is_told_with_the_sql_that_mends_it(daemon: Tabled, postgres_dsn: str) -> None:
    with daemon.stub() as stub:
        for statement, said in BREAKING.items():
            execute(postgres_dsn, f"DO $do$ BEGIN {statement}; END $do$")
            until(lambda said=said: said in daemon.reason)  # type: ignore[misc]
            for mending in daemon.reason.partition("This SQL mends it: ")[2].split("; "):
                execute(postgres_dsn, mending)
            until(lambda: daemon.is_ready)
            assert code_of(lambda: start(stub)) is StatusCode.OK, statement


def test_changes_that_do_no_harm_fail_no_call(daemon: Tabled, postgres_dsn: str) -> None:
    with daemon.stub() as stub:
        for statement in HARMLESS:
            execute(postgres_dsn, statement)
            for _ in range(5):
                token = start(stub)
                stub.SetValue(SetValueRequest(access_token=token, key="k", value="v"))
                stub.Get(GetRequest(access_token=token))
        assert daemon.is_ready
        execute(postgres_dsn, "DROP INDEX mnemosyne.session_subject_id_idx")
        # The type of a moment ago may have been seen too, and told of before.
        while INDEX not in (line := daemon.wait_for("table_changed"))["reason"]:
            pass
        execute(postgres_dsn, line["reason"].partition("This SQL mends it: ")[2])

        assert daemon.is_ready


@pytest.mark.parametrize("what", [f"TABLE {TABLE}", "SCHEMA mnemosyne CASCADE"])
def test_a_dropped_table_is_made_again_and_no_copy_of_a_lost_session_is_served(
    daemon: Tabled, postgres_dsn: str, what: str
) -> None:
    with daemon.stub() as stub:
        token = start(stub)
        execute(postgres_dsn, f"DROP {what}")
        until(lambda: "is missing" in daemon.reason)
        code = code_of(lambda: start(stub))
        line = daemon.wait_for("table_made_again")
        until(lambda: daemon.is_ready)

        assert code is StatusCode.UNAVAILABLE
        assert (line["level"], line["sessions"]) == ("error", "all are gone")
        assert code_of(lambda: stub.Get(GetRequest(access_token=token))) is StatusCode.NOT_FOUND
        assert code_of(lambda: stub.Get(GetRequest(access_token=start(stub)))) is StatusCode.OK


@pytest.mark.parametrize(
    "statements",
    [
        (f"TRUNCATE {TABLE}",),
        (
            f"CREATE TABLE mnemosyne.restored (LIKE {TABLE} INCLUDING ALL)",
            (
                f"DO $$ BEGIN ALTER TABLE {TABLE} RENAME TO old; "
                "ALTER TABLE mnemosyne.restored RENAME TO session; END $$"
            ),
        ),
        (
            f"CREATE TABLE mnemosyne.restored (LIKE {TABLE} INCLUDING ALL)",
            f"DO $$ BEGIN DROP TABLE {TABLE}; ALTER TABLE mnemosyne.restored RENAME TO session; END $$",
        ),
    ],
)
def test_copies_of_sessions_end_with_the_rows_of_the_table(
    daemon: Tabled, postgres_dsn: str, statements: tuple[str, ...]
) -> None:
    with daemon.stub() as stub:
        token = start(stub)
        execute(postgres_dsn, *statements)
        until(lambda: code_of(lambda: stub.Get(GetRequest(access_token=token))) is StatusCode.NOT_FOUND, 5)

        assert code_of(lambda: stub.Get(GetRequest(access_token=start(stub)))) is StatusCode.OK
        assert daemon.is_ready


def test_a_database_that_is_renamed_or_dropped_is_awaited(daemon: Tabled, postgres_dsn: str) -> None:
    parts = urlsplit(postgres_dsn)
    name, others = parts.path[1:], parts._replace(path="/postgres").geturl()
    ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
    for gone, back in (
        (f"ALTER DATABASE {name} RENAME TO {name}_other", f"ALTER DATABASE {name}_other RENAME TO {name}"),
        (f"DROP DATABASE {name} WITH (FORCE)", f"CREATE DATABASE {name}"),
    ):
        execute(others, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", ended, "SELECT pg_sleep(0.1)")
        execute(others, gone)
        until(lambda: "3D000" in daemon.reason)
        execute(others, back)
        renamed = f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"
        execute(others, renamed)
        until(lambda: daemon.is_ready)
        with daemon.stub() as stub:
            assert code_of(lambda: start(stub)) is StatusCode.OK
