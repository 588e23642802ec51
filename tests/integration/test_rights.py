"""Roles with few rights: what docs/storage.md lists is enough, and what is missing is named as SQL."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from replicas import execute
from stores import lookups, new, new_postgres_store

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import Criteria, Session, Touch
from mnemosyned.sessions.store import Renaming, StorageRefused
from mnemosyned.storage.postgres.rights import RUNNING
from mnemosyned.storage.postgres.schema import Table

DOCUMENT = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
TABLE = Table(schema="mnemosyne", name="session")


def documented(name: str, database: str) -> str:
    """The SQL that the document has under this name, for another database."""
    found = re.search(rf"<!-- rights: {name} -->\n```sql\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    return found[1].replace("DATABASE sessions", f"DATABASE {database}")


@dataclass
class Database:
    name: str
    dsn: str  # of a superuser
    role_dsn: str  # of the role in the document

    def run(self, sql: str) -> None:
        for statement in sql.split(";"):
            if statement.strip():
                execute(self.dsn, statement)


@pytest.fixture
async def database(postgres_dsn: str) -> AsyncIterator[Database]:
    """One in which nobody else may do anything."""
    parts = urlsplit(postgres_dsn)
    name = parts.path[1:]
    role_dsn = parts._replace(netloc=f"mnemosyned:secret@{parts.hostname}:{parts.port}").geturl()
    one = Database(name, postgres_dsn, role_dsn)
    one.run(
        f"DROP ROLE IF EXISTS mnemosyned; REVOKE ALL ON DATABASE {name} FROM PUBLIC; "
        "REVOKE ALL ON SCHEMA public FROM PUBLIC"
    )
    yield one
    one.run("DROP OWNED BY mnemosyned CASCADE; DROP ROLE mnemosyned")


async def works(dsn: str) -> None:
    """Do all that a daemon does."""
    store = new_postgres_store(dsn, TABLE)
    await store.open()
    try:
        (started,) = await store.start([new("t")])
        assert isinstance(started, Session)
        await store.load(lookups("t"))
        await store.touch([Touch(access_token="t", expires_at_us=started.expires_at_us + 1)])
        await store.rename([Renaming(old="t", new="u")])
        await store.find(Criteria(), offset=0, limit=1)
        await store.stored_from("", limit=1)
        await store.clean_up(limit=1)
        assert len((await store.delete(Criteria(access_token="u"), limit=1)).stored_keys) == 1
        assert len(await store.identity()) == 16
        assert await store.estimated_sessions() >= 0
        await store.check()
    finally:
        await store.close()


async def refusal(dsn: str) -> str:
    store = new_postgres_store(dsn, TABLE)
    with pytest.raises(StorageRefused) as refused:
        await store.open()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def mending(line: str) -> str:
    return line.partition("This SQL mends it: ")[2]


async def test_the_rights_for_running_are_enough_for_a_table_of_the_former_form(database: Database) -> None:
    database.run(documented("set-up", database.name) + documented("running", database.name))
    database.run(
        "ALTER TABLE mnemosyne.session DROP COLUMN due_at; "
        "CREATE INDEX ON mnemosyne.session (expire_at, access_token)"
    )

    await works(database.role_dsn)


async def test_the_documented_table_is_the_one_that_the_daemon_makes(database: Database) -> None:
    forms = []
    for names in (("set-up", "running"), ("own schema",)):
        for name in names:
            database.run(documented(name, database.name))
        await works(database.role_dsn)
        connection = await asyncpg.connect(database.dsn)
        facts = await connection.fetch(
            "SELECT pg_get_indexdef(indexrelid) AS one FROM pg_index WHERE indrelid = $1::text::regclass "
            "UNION SELECT concat_ws(' ', attname, atttypid::regtype, attnotnull, atthasdef) "
            "FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped "
            "UNION SELECT reloptions::text FROM pg_class WHERE oid = $1::text::regclass ORDER BY one",
            TABLE.sql,
        )
        forms.append([row["one"] for row in facts])
        await connection.execute(
            "DROP SCHEMA mnemosyne CASCADE; DROP OWNED BY mnemosyned; DROP ROLE mnemosyned"
        )
        await connection.close()
    database.run(documented("own schema", database.name))

    assert forms[0] == forms[1]
    assert "due_at timestamp with time zone t t" in forms[0]


@pytest.mark.parametrize("names", [("own schema",), ("set-up", "running")])
async def test_the_documented_rights_are_enough(database: Database, names: tuple[str, ...]) -> None:
    for name in names:
        database.run(documented(name, database.name))

    await works(database.role_dsn)
    await works(database.role_dsn)


@pytest.mark.parametrize(
    ("revoked", "named"),
    [
        *((f"{right} ON TABLE mnemosyne.session", f"{right} on table") for right in RUNNING),
        ("SELECT, DELETE ON TABLE mnemosyne.session", "SELECT, DELETE on table"),
        ("USAGE ON SCHEMA mnemosyne", 'USAGE on schema "mnemosyne"'),
    ],
)
async def test_a_missing_right_is_named_at_the_start_and_when_it_is_revoked(
    database: Database, revoked: str, named: str
) -> None:
    database.run(documented("set-up", database.name) + documented("running", database.name))
    store = new_postgres_store(database.role_dsn, TABLE)
    await store.open()
    await store.check()

    database.run(f"REVOKE {revoked} FROM mnemosyned")
    with pytest.raises(StorageUnavailable) as failed:
        await store.check()
    line = await refusal(database.role_dsn)
    database.run(mending(line))

    assert f"user mnemosyned lacks {named}" in line
    assert failed.value.detail == line
    await store.check()
    await store.close()
    await works(database.role_dsn)


async def test_what_is_missing_to_make_schema_table_and_indexes_is_named(database: Database) -> None:
    database.run("CREATE ROLE mnemosyned LOGIN PASSWORD 'secret'")
    lines = []
    # CONNECT, CREATE on the database; then a schema of another role without anything in it.
    lines.append(await refusal(database.role_dsn))
    database.run(mending(lines[-1]))
    lines.append(await refusal(database.role_dsn))
    database.run("CREATE SCHEMA mnemosyne")
    lines.append(await refusal(database.role_dsn))
    database.run(mending(lines[-1]))
    await works(database.role_dsn)

    assert 'GRANT CONNECT ON DATABASE "' in lines[0]
    assert f"lacks CREATE on database {database.name}" in lines[1]
    assert 'lacks USAGE on schema "mnemosyne"; CREATE on schema "mnemosyne"' in lines[2]


async def test_the_right_to_create_in_the_database_is_enough_too(database: Database) -> None:
    database.run("CREATE ROLE mnemosyned LOGIN PASSWORD 'secret'")
    database.run(f"GRANT CONNECT, CREATE ON DATABASE {database.name} TO mnemosyned")

    await works(database.role_dsn)


async def test_indexes_that_only_the_owner_may_make_are_named(database: Database) -> None:
    database.run(documented("set-up", database.name) + documented("running", database.name))
    database.run(
        "DROP INDEX mnemosyne.session_subject_id_idx; DROP INDEX mnemosyne.session_refresh_token_idx"
    )

    line = await refusal(database.role_dsn)
    database.run(mending(line))

    assert "user mnemosyned is not its owner" in line
    await works(database.role_dsn)


async def test_a_table_that_the_role_may_not_make_again_is_told_with_the_sql(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.storage.postgres.table_health._MAKE_AGAIN_AFTER_S", 0.0)
    database.run(documented("set-up", database.name) + documented("running", database.name))
    store = new_postgres_store(database.role_dsn, TABLE)
    await store.open()
    database.run("DROP TABLE mnemosyne.session")

    with pytest.raises(StorageUnavailable) as failed:
        await store.check()
    database.run(mending(failed.value.detail))
    with pytest.raises(StorageUnavailable):
        await store.check()
    await store.check()
    await store.close()

    assert (
        "is missing, and cannot be made again: PostgreSQL: user mnemosyned lacks CREATE"
        in failed.value.detail
    )


async def test_a_role_that_is_dropped_is_told(database: Database) -> None:
    database.run(documented("set-up", database.name) + documented("running", database.name))
    store = new_postgres_store(database.role_dsn, TABLE)
    await store.open()
    database.run("DROP OWNED BY mnemosyned CASCADE; DROP ROLE mnemosyned")

    with pytest.raises(StorageUnavailable) as failed:
        await store.check()
    database.run(documented("running", database.name))
    database.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mnemosyned'"
    )
    connection = await asyncpg.connect(database.dsn)
    await connection.close()

    assert failed.value.detail
    for _ in range(5):
        try:
            await store.check()
        except StorageUnavailable:
            continue
        break
    else:
        pytest.fail("it does not come back")
    await store.close()


async def test_a_missing_right_of_a_cluster_is_named(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.run(documented("own schema", database.name))
    database.run("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    store = new_postgres_store(database.role_dsn, TABLE)
    await store.open()

    with pytest.raises(StorageUnavailable):
        await store.identity()
    (line,) = [one for one in caplog.records if one.message == "right_missing"]
    database.run(line.mending)  # type: ignore[attr-defined]

    assert await store.identity()
    await store.close()
