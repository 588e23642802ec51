"""Tables as people have them: what a start refuses and the SQL that it offers, and what it accepts."""

# ruff: noqa: S608  # constant statements

from __future__ import annotations

from typing import Final

import asyncpg
import pytest
from stores import lookups, new, new_postgres_store

from mnemosyned.errors import InvalidArgument, StorageUnavailable
from mnemosyned.sessions.model import Abandonment, Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.schema import Table

TABLE: Final = Table(schema="mnemosyne", name="session")
COLUMNS: Final = (
    "access_token BYTEA, refresh_token BYTEA, subject_id TEXT NOT NULL, subject_client TEXT, "
    "bag BYTEA NOT NULL, expire_at TIMESTAMPTZ NOT NULL"
)
PLAIN: Final = f"CREATE TABLE mnemosyne.session ({COLUMNS}, PRIMARY KEY (access_token))"
KEYLESS: Final = f"CREATE TABLE mnemosyne.session ({COLUMNS})"
ROW: Final = "INSERT INTO mnemosyne.session VALUES ('t', 'r', 's', 'c', '', now() + interval '1 h')"
ALTER: Final = f"{PLAIN}; ALTER TABLE mnemosyne.session "
ON_INSERT: Final = "BEFORE INSERT ON mnemosyne.session FOR EACH ROW EXECUTE FUNCTION mnemosyne.f()"


def with_column(definition: str) -> str:
    name = definition.split(maxsplit=1)[0]
    definitions = [definition if one.startswith(name) else one for one in COLUMNS.split(", ")]
    return PLAIN.replace(COLUMNS, ", ".join(definitions))


def function(body: str) -> str:
    return (
        f"{PLAIN}; CREATE FUNCTION mnemosyne.f() RETURNS trigger LANGUAGE plpgsql "
        f"AS $$ BEGIN {body} RETURN NEW; END $$; "
    )


# By what is said of it: what was done to the database before the start.
REFUSED: Final = {
    "no primary key on access_token": f"{KEYLESS}; {ROW}",
    "some rows have no token": f"{KEYLESS}; {ROW}; {ROW}; UPDATE mnemosyne.session SET access_token = NULL "
    f"WHERE ctid = '(0,1)'; {ROW}",
    "is partial": f"{KEYLESS}; CREATE UNIQUE INDEX ON mnemosyne.session (access_token) WHERE bag <> ''",
    "is invalid": f"{KEYLESS}; CREATE UNIQUE INDEX i ON mnemosyne.session (access_token); "
    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'mnemosyne.i'::regclass",
    "no primary key on access_token (": f"{KEYLESS}; "
    "CREATE UNIQUE INDEX ON mnemosyne.session (access_token) WHERE subject_id <> ''",
    "has no primary key on access_token. ": f"{KEYLESS}; ALTER TABLE mnemosyne.session "
    "ADD PRIMARY KEY (subject_id, access_token)",
    "constraint session_pkey is deferrable": f"{KEYLESS}; "
    "ALTER TABLE mnemosyne.session ADD PRIMARY KEY (access_token) DEFERRABLE",
    "constraint session_access_token_key is deferrable": f"{ALTER} ADD UNIQUE (access_token) DEFERRABLE",
    "it is a view": f"{PLAIN}; {ROW}; ALTER TABLE mnemosyne.session RENAME TO t; "
    "CREATE VIEW mnemosyne.session AS SELECT * FROM mnemosyne.t",
    "it is a materialized view": f"{PLAIN}; ALTER TABLE mnemosyne.session RENAME TO t; "
    "CREATE MATERIALIZED VIEW mnemosyne.session AS SELECT * FROM mnemosyne.t",
    "it is a foreign table": "CREATE EXTENSION file_fdw; CREATE SERVER s FOREIGN DATA WRAPPER file_fdw; "
    f"CREATE FOREIGN TABLE mnemosyne.session ({COLUMNS}) SERVER s OPTIONS (filename '/dev/null')",
    "it is a sequence": "CREATE SEQUENCE mnemosyne.session",
    "it is a index": "CREATE TABLE mnemosyne.t (a int); CREATE INDEX session ON mnemosyne.t (a)",
    "it is a type": "CREATE TYPE mnemosyne.session AS (a int)",
    "a type has its name": "CREATE TYPE mnemosyne.session AS ENUM ('a')",
    "column access_token is missing, so it has no sessions": "CREATE TABLE mnemosyne.session (id int); "
    "CREATE TABLE mnemosyne.session_old1 (id int)",
    "partitions do not cover": f"{KEYLESS} PARTITION BY HASH (access_token); ALTER TABLE mnemosyne.session "
    "ADD PRIMARY KEY (access_token); CREATE TABLE mnemosyne.part PARTITION OF mnemosyne.session "
    "FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
    "partitions do not cover every": f"{KEYLESS} PARTITION BY RANGE (expire_at)",
    "it is a partition of mnemosyne.whole": f"CREATE TABLE mnemosyne.whole ({COLUMNS}) PARTITION BY LIST "
    "(subject_id); CREATE TABLE mnemosyne.session PARTITION OF mnemosyne.whole FOR VALUES IN ('a'); "
    "ALTER TABLE mnemosyne.session ADD PRIMARY KEY (access_token)",
    'column "tenant id" is NOT NULL': f'{ALTER} ADD "tenant id" int NOT NULL',
    'column "Tenant" is NOT NULL and has no default': f'{KEYLESS}; ALTER TABLE mnemosyne.session '
    'ADD "Tenant" int; ALTER TABLE mnemosyne.session ADD PRIMARY KEY ("Tenant", access_token)',
    "constraint short refuses": f"{ALTER} ADD CONSTRAINT short CHECK (octet_length(bag) < 10)",
    "constraint users refuses": "CREATE TABLE mnemosyne.users (id text PRIMARY KEY); "
    f"{ALTER} ADD CONSTRAINT users FOREIGN KEY (subject_id) REFERENCES mnemosyne.users",
    "keeps sessions from being ended": f"{PLAIN}; CREATE TABLE mnemosyne.log "
    "(token bytea REFERENCES mnemosyne.session)",
    "constraint session_subject_id_key refuses sessions with the same subject_id": f"{ALTER} "
    "ADD UNIQUE (subject_id)",
    "index mnemosyne.once refuses": f"{PLAIN}; CREATE UNIQUE INDEX once ON mnemosyne.session "
    "(lower(subject_id))",
    "refuses sessions with the same refresh_token": f"{PLAIN}; "
    "CREATE UNIQUE INDEX ON mnemosyne.session (refresh_token)",
    "constraint one refuses": f"{ALTER} ADD CONSTRAINT one EXCLUDE (expire_at WITH =)",
    "triggers: bad": function("RAISE EXCEPTION 'no';") + f"CREATE TRIGGER bad {ON_INSERT}",
    "could not be started": function("RETURN NULL;") + f'CREATE TRIGGER "Bad one" {ON_INSERT}',
    "could not be read as it was": function("NEW.bag = 'x';") + f"CREATE TRIGGER bad {ON_INSERT}",
    "renamed or ended": function("RETURN NULL;")
    + "CREATE TRIGGER bad BEFORE DELETE ON mnemosyne.session FOR EACH ROW EXECUTE FUNCTION mnemosyne.f()",
    "could not be extended": function("RETURN NULL;")
    + "CREATE TRIGGER bad BEFORE UPDATE ON mnemosyne.session FOR EACH ROW EXECUTE FUNCTION mnemosyne.f()",
    "rule nothing changes": f"{PLAIN}; CREATE RULE nothing AS ON INSERT TO mnemosyne.session DO NOTHING",
    "column access_token should be bytea, and is text": f"{with_column('access_token TEXT')}; {ROW}",
    "column bag should be bytea, and is text": f"{with_column('bag TEXT NOT NULL DEFAULT $$x$$')}; {ROW}",
    "column subject_id should be text, and is character varying(n)": f"{ALTER} "
    "ALTER subject_id TYPE varchar(20)",
    "column subject_id should be text, and is bytea": PLAIN.replace("subject_id TEXT", "subject_id BYTEA"),
    "column subject_id should be text, and is integer": PLAIN.replace(
        "subject_id TEXT NOT NULL", "subject_id int GENERATED BY DEFAULT AS IDENTITY"
    ),
    "should be timestamptz, and is timestamp without": f"{PLAIN.replace('TIMESTAMPTZ', 'TIMESTAMP')}; {ROW}",
    "should be timestamptz, and is bigint": PLAIN.replace("TIMESTAMPTZ", "BIGINT DEFAULT 5"),
    "column refresh_token should be bytea, and is missing": f"{ALTER} DROP refresh_token",
    "column bag should be bytea, and is missing": f"{PLAIN}; {ROW}; ALTER TABLE mnemosyne.session DROP bag",
    "column subject_client is generated": PLAIN.replace(
        "subject_client TEXT", "subject_client TEXT GENERATED ALWAYS AS (upper(subject_id)) STORED"
    ),
    "different texts are equal": "CREATE COLLATION mnemosyne.ci (provider = icu, locale = 'und-u-ks-level2', "
    f"deterministic = false); {ALTER} ALTER subject_id TYPE text COLLATE mnemosyne.ci",
    "column due_at is NOT NULL and has no default": f"{ALTER} ADD due_at timestamptz NOT NULL",
    "constraint late refuses some sessions": f"{ALTER} ADD due_at timestamptz NOT NULL DEFAULT now(), "
    "ADD CONSTRAINT late CHECK (due_at <= now())",
    "refuses sessions with the same due_at": f"{ALTER} ADD due_at timestamptz UNIQUE",
    "it is UNLOGGED": PLAIN.replace("CREATE", "CREATE UNLOGGED"),
    "inherits from it": f"{PLAIN}; CREATE TABLE mnemosyne.child () INHERITS (mnemosyne.session)",
}  # fmt: skip

ACCEPTED: Final = {
    "more columns with defaults": f"{ALTER} ADD id bigserial UNIQUE, ADD made timestamptz NOT NULL "
    "DEFAULT now(), ADD note text, ADD up text GENERATED ALWAYS AS (upper(subject_id)) STORED, "
    "ADD uid uuid DEFAULT gen_random_uuid() UNIQUE",
    "a CHECK on another column": f"{ALTER} ADD note text CHECK (length(note) < 9)",
    "a unique index instead of the key": f"{KEYLESS}; "
    "CREATE UNIQUE INDEX ON mnemosyne.session (access_token)",
    "a key of its own": f"{KEYLESS}; ALTER TABLE mnemosyne.session ADD id bigserial PRIMARY KEY, "
    "ADD UNIQUE (access_token)",
    "a key with more in its index": f"{KEYLESS}; "
    "ALTER TABLE mnemosyne.session ADD PRIMARY KEY (access_token) INCLUDE (subject_id)",
    "a unique index that has the token": f"{ALTER} ADD UNIQUE (subject_id, access_token)",
    "columns that may be NULL": PLAIN.replace(" NOT NULL", ""),
    "columns that may not": PLAIN.replace("refresh_token BYTEA", "refresh_token BYTEA NOT NULL"),
    "another sequence of columns": "CREATE TABLE mnemosyne.session (expire_at timestamptz, bag bytea, "
    "subject_client text, subject_id text, refresh_token bytea, access_token bytea PRIMARY KEY)",
    "partitions for every token": f"{KEYLESS} PARTITION BY HASH (access_token); "
    "ALTER TABLE mnemosyne.session ADD PRIMARY KEY (access_token); "
    "CREATE TABLE mnemosyne.p0 PARTITION OF mnemosyne.session FOR VALUES WITH (MODULUS 2, REMAINDER 0); "
    "CREATE TABLE mnemosyne.p1 PARTITION OF mnemosyne.session FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    "another collation": f'{ALTER} ALTER subject_id TYPE text COLLATE "C"',
    "a trigger that only looks on": function("PERFORM pg_notify('started', '');")
    + f"CREATE TRIGGER looks {ON_INSERT}",
    "a trigger that is disabled": function("RETURN NULL;")
    + f"CREATE TRIGGER off {ON_INSERT}; ALTER TABLE mnemosyne.session DISABLE TRIGGER off",
    "a row that ends with its session": f"{PLAIN}; CREATE TABLE mnemosyne.log "
    "(token bytea REFERENCES mnemosyne.session ON DELETE CASCADE)",
    "the form that new tables have": f"{ALTER} ADD due_at timestamptz NOT NULL DEFAULT now(); "
    "CREATE INDEX ON mnemosyne.session (due_at)",
    "a due time of others": f"{ALTER} ADD due_at date NOT NULL DEFAULT now()",
    "a generated due time": f"{ALTER} ADD due_at timestamptz GENERATED ALWAYS AS (expire_at) STORED; "
    "CREATE INDEX ON mnemosyne.session (due_at)",
    "fillfactor": f"{ALTER} SET (fillfactor = 70)",
    "row security that its owner passes": f"{ALTER} ENABLE ROW LEVEL SECURITY",
}  # fmt: skip


async def prepare(dsn: str, sql: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"CREATE SCHEMA mnemosyne; {sql}")
    return connection


async def works(dsn: str, table: Table = TABLE) -> None:
    store = new_postgres_store(dsn, table)
    await store.open()
    try:
        one, other = new("one"), new("other")
        started = await store.start([one, other])
        loaded = await store.load(lookups("one", "other"))
    finally:
        await store.close()
    assert all(isinstance(result, Session) for result in (*started, *loaded))


async def refusal(dsn: str, table: Table = TABLE) -> str:
    store = new_postgres_store(dsn, table)
    with pytest.raises(StorageRefused) as refused:
        await store.open()
    return str(refused.value)


def mending(line: str) -> str:
    assert "\n" not in line
    return line.partition("This SQL mends it: ")[2]


@pytest.mark.parametrize("said", REFUSED)
async def test_a_table_that_callers_would_fail_on_is_refused_with_sql_that_mends_it(
    postgres_dsn: str, said: str
) -> None:
    connection = await prepare(postgres_dsn, REFUSED[said])

    line = await refusal(postgres_dsn)
    await connection.execute(mending(line))
    await connection.close()

    assert said in line
    assert mending(line)
    await works(postgres_dsn)


@pytest.mark.parametrize("kind", ACCEPTED)
async def test_a_table_with_harmless_additions_is_accepted(postgres_dsn: str, kind: str) -> None:
    connection = await prepare(postgres_dsn, ACCEPTED[kind])
    await connection.close()

    await works(postgres_dsn)


async def test_all_faults_are_told_at_once_and_mended_in_one_go(postgres_dsn: str) -> None:
    connection = await prepare(
        postgres_dsn,
        f"{KEYLESS.replace('access_token BYTEA', 'access_token TEXT').replace('TABLE', 'UNLOGGED TABLE')}; "
        f"ALTER TABLE mnemosyne.session ADD x int NOT NULL, ADD UNIQUE (subject_id); "
        "ALTER TABLE mnemosyne.session ADD CHECK (length(access_token) < 9)",
    )

    line = await refusal(postgres_dsn)
    await connection.execute(mending(line))
    await connection.close()

    assert line.count("; ") >= 8
    await works(postgres_dsn)


@pytest.mark.parametrize(
    "table",
    [
        Table(schema='Odd "schema"; -- \'', name='Séssion. "x"'),
        Table(schema="x" * 63, name="é" * 31),
        Table(schema="SELECT", name="$1"),
    ],
)
async def test_names_of_any_kind_are_kept(postgres_dsn: str, table: Table) -> None:
    await works(postgres_dsn, table)
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"ALTER TABLE {table.sql} DROP CONSTRAINT IF EXISTS none")
    rows = await connection.fetch(
        "SELECT conname FROM pg_constraint WHERE contype = 'p' AND conrelid = $1::text::regclass", table.sql
    )
    quoted = '"' + rows[0]["conname"].replace('"', '""') + '"'
    await connection.execute(f"ALTER TABLE {table.sql} DROP CONSTRAINT {quoted}")

    await connection.execute(mending(await refusal(postgres_dsn, table)))
    await connection.execute(
        f"ALTER TABLE {table.sql} RENAME TO other; CREATE VIEW {table.sql} AS SELECT 1 AS a"
    )
    await connection.execute(mending(await refusal(postgres_dsn, table)))
    await connection.close()

    await works(postgres_dsn, table)


async def test_a_constraint_that_is_added_later_fails_only_what_it_refuses(postgres_dsn: str) -> None:
    store = new_postgres_store(postgres_dsn, TABLE)
    await store.open()
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "ALTER TABLE mnemosyne.session ADD CHECK (subject_id <> 'checked'); "
        "CREATE TABLE mnemosyne.log (token bytea REFERENCES mnemosyne.session)"
    )
    started = await store.start([new("a", subject_id="checked"), new("b"), new("c")])
    await connection.execute("INSERT INTO mnemosyne.log VALUES ('b')")
    ended = await store.abandon([Abandonment(access_token="b"), Abandonment(access_token="c")])
    await connection.close()
    await store.close()

    assert [type(one) for one in started] == [InvalidArgument, Session, Session]
    assert [type(one) for one in ended] == [StorageUnavailable, bool]


async def test_a_table_keeps_its_identity_when_it_is_made_again(postgres_dsn: str) -> None:
    identities = []
    for table in (TABLE, TABLE, Table(schema="mnemosyne", name="other")):
        store = new_postgres_store(postgres_dsn, table)
        await store.open()
        identities.append(await store.identity())
        await store.close()
        connection = await asyncpg.connect(postgres_dsn)
        await connection.execute(f"DROP TABLE {table.sql}")
        await connection.close()

    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("schema", ["pg_temp", "pg_catalog", "information_schema"])
async def test_a_schema_of_postgresqls_own_is_refused(postgres_dsn: str, schema: str) -> None:
    assert f"flag -postgres.schema: {schema} is" in await refusal(
        postgres_dsn, Table(schema=schema, name="session")
    )


async def test_sessions_in_another_schema_are_told_of_before_an_empty_table_is_made(
    postgres_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = await prepare(postgres_dsn, PLAIN.replace("mnemosyne.", "public."))
    await connection.close()

    await works(postgres_dsn)

    (line,) = [one for one in caplog.records if one.message == "sessions_in_another_schema"]
    assert line.found == "public.session"  # type: ignore[attr-defined]


async def test_row_security_is_refused_unless_it_lets_every_row_through(postgres_dsn: str) -> None:
    connection = await prepare(
        postgres_dsn,
        f"{ALTER} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; DROP ROLE IF EXISTS plain; "
        "CREATE ROLE plain LOGIN PASSWORD 'plain'; ALTER SCHEMA mnemosyne OWNER TO plain; "
        "ALTER TABLE mnemosyne.session OWNER TO plain; "
        "CREATE POLICY partly ON mnemosyne.session USING (subject_id <> 'hidden')",
    )
    plain = f"postgres://plain:plain@{postgres_dsn.partition('@')[2]}"
    line = await refusal(plain)
    await connection.execute("DROP POLICY partly ON mnemosyne.session")
    await connection.execute("CREATE POLICY every ON mnemosyne.session USING (true)")
    await works(plain)
    await connection.execute(
        "CREATE POLICY less ON mnemosyne.session AS RESTRICTIVE USING (subject_id <> 'x')"
    )
    again = await refusal(plain)
    await connection.execute(mending(again))
    await connection.execute("DELETE FROM mnemosyne.session")

    assert "row security hides sessions from plain" in line
    await works(plain)
    await connection.execute("DROP SCHEMA mnemosyne CASCADE; DROP ROLE plain")
    await connection.close()
