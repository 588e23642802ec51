"""The statements for servers that are not PostgreSQL itself, run on PostgreSQL, with what differs there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from stores import bags, lookups, new, new_postgres_store

from cluster.node_row import Renewal
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import Abandonment, Session, ValueChange
from mnemosyned.sessions.store import Renaming
from mnemosyned.storage.postgres import session_settings
from mnemosyned.storage.postgres.kind import POSTGRESQL, Kind, kind_of
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

PLAIN = Kind("plain", is_plain=True)
TABLE = Table(schema="mnemosyne", name="session")


async def opened(dsn: str, count: int, kind: Kind | None = PLAIN) -> list[PostgresStore]:
    stores = [new_postgres_store(dsn, TABLE, kind) for _ in range(count)]
    await asyncio.gather(*(store.open() for store in stores))
    return stores


async def closed(stores: list[PostgresStore]) -> None:
    await asyncio.gather(*(store.close() for store in stores))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"server_version": "15.4 (Debian 15.4-1)"}, "PostgreSQL"),
        ({"server_version": "13.0.0", "crdb_version": "CockroachDB CCL v24.1.0"}, "CockroachDB"),
        ({"server_version": "15.2-YB-2025.1.0.0-b0"}, "YugabyteDB"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_server_is_known_by_what_it_says_when_it_is_connected(settings: dict[str, str], kind: str) -> None:
    connection: Any = SimpleNamespace(get_settings=lambda: SimpleNamespace(**settings))
    found = kind_of(connection)

    assert found.name == kind
    assert found.is_plain == (kind != POSTGRESQL.name)


async def test_many_nodes_that_start_at_once_make_one_table_and_have_one_identity(postgres_dsn: str) -> None:
    stores = await opened(postgres_dsn, 8)
    identities = {await store.identity() for store in stores}
    renewed = [await store.renew(Renewal(str(at), at, 1, "r", 0)) for at, store in enumerate(stores)]

    assert len(identities) == 1
    # Its servers may start one by one: which of them answers does not matter.
    assert len({one.identity for one in renewed}) == 1
    assert len({await store.check() for store in stores}) == 1
    await closed(stores)


async def test_tables_that_were_made_by_themselves_have_different_identities(postgres_dsn: str) -> None:
    (store,) = await opened(postgres_dsn, 1)
    other = new_postgres_store(postgres_dsn, Table(schema="other", name="session"), PLAIN)
    await other.open()

    assert await store.identity() != await other.identity()
    await closed([store, other])


async def test_all_writes_succeed_where_every_transaction_is_serializable(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of = session_settings.settings_of

    def settings(timeout_s: float, major: int) -> dict[str, str]:
        return settings_of(timeout_s, major) | {"default_transaction_isolation": "serializable"}

    monkeypatch.setattr(session_settings, "settings_of", settings)
    stores = await opened(postgres_dsn, 2)
    large = bag.encode({"large": "x" * 2000})
    await stores[0].start([new("a", bag=large), *(new(f"t{number}") for number in range(16))])

    async def work(number: int) -> list[object]:
        store = stores[number % 2]
        return [
            *await store.set_values([ValueChange(access_token="a", key=f"k{number}", value="v")]),
            *await store.rename([Renaming(old=f"t{number}", new=f"u{number}")]),
            *await store.abandon([Abandonment(access_token=f"u{number}")]),
        ]

    results = await asyncio.gather(*(work(number) for number in range(16)))
    (after,) = await stores[1].load(lookups("a"))

    assert [rest for _, *rest in results] == [[True, True]] * 16
    assert isinstance(after, Session)
    assert len(bag.decode(after.bag)) == 17
    await closed(stores)


async def test_a_bag_that_is_changed_and_changed_back_takes_the_change(postgres_dsn: str) -> None:
    (store,) = await opened(postgres_dsn, 1)
    await store.start([new("a", bag=bag.encode({"k": "old"}))])
    store._values.bags.take(b"a")
    connection = await asyncpg.connect(postgres_dsn)
    # Another version of the row, and the same bag: a touch, or a Go daemon that wrote it twice.
    await connection.execute(f"UPDATE {TABLE.sql} SET expire_at = expire_at + interval '1 s'")  # noqa: S608  # quoted
    await connection.close()

    (values,) = bags(await store.set_values([ValueChange(access_token="a", key="k", value="new")]))
    assert values == {"k": "new"}
    await closed([store])


async def test_a_table_of_postgresql_is_used_with_plain_statements_too(postgres_dsn: str) -> None:
    before = await opened(postgres_dsn, 1, kind=None)
    await before[0].start([new("a")])
    plain = await opened(postgres_dsn, 1)

    assert await plain[0].exist(["a"]) == [True]
    await plain[0].start([new("b")])
    assert await before[0].exist(["b"]) == [True]
    await closed([*before, *plain])
