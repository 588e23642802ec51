from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from serving import configured

from mnemosyned.config.flags import ConfigError
from mnemosyned.settings import SECTIONS
from mnemosyned.storage import engines
from mnemosyned.storage.engines import ENGINES, StorageConfig, Surroundings, new_store, token_hasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.storage.mongodb.store import MongoStore
from mnemosyned.storage.postgres.store import PostgresStore
from mnemosyned.storage.redis.store import RedisStore


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("memory", MemoryStore),
        ("postgres", PostgresStore),
        ("redis", RedisStore),
        ("mongodb", MongoStore),
    ],
)
def test_each_name_builds_its_own_engine(name: str, store: type) -> None:
    config = configured(f"-storage={name}")
    engine = config[StorageConfig].engine

    assert engine.name == name
    assert type(engine.build(config, Surroundings(registry=CollectorRegistry()))) is store


def test_a_name_that_is_not_registered_reaches_no_engine() -> None:
    with pytest.raises(
        ConfigError, match="flag -storage: 'etcd' is not one of postgres, redis, mongodb, memory"
    ):
        configured("-storage=etcd")


def test_the_sections_of_all_engines_are_among_the_settings() -> None:
    assert set(engines.sections()) <= set(SECTIONS)
    assert {engine.section for engine in ENGINES.values()} - {None} <= set(engines.sections())


def test_with_an_hmac_key_the_store_is_behind_a_hashed_one(tmp_path: Path) -> None:
    key = tmp_path / "token.key"
    key.write_text("a key that only these tests know".replace(" ", "-"))
    config = configured("-storage=memory", f"-token.key.file={key}")
    store = new_store(config, Surroundings(registry=CollectorRegistry()), token_hasher(config))

    assert isinstance(store, HashedStore)


def test_an_engine_that_cannot_rename_is_refused_an_hmac_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "token.key"
    key.write_text("a key that only these tests know".replace(" ", "-"))
    memory = ENGINES["memory"]
    limited = replace(memory, capabilities=replace(memory.capabilities, can_rename=False))
    monkeypatch.setitem(ENGINES, "memory", limited)

    with pytest.raises(ConfigError, match="-storage=memory cannot hash tokens at rest"):
        configured("-storage=memory", f"-token.key.file={key}")
