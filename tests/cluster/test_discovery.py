from __future__ import annotations

import pytest

from cluster.discovery import Seeds, addresses, own_address


async def test_a_seed_stands_for_each_of_its_addresses_once() -> None:
    found = await addresses(["127.0.0.1:80", "127.0.0.1:80", "[::1]:81"])
    assert found == {"127.0.0.1:80": "127.0.0.1:80", "[::1]:81": "[::1]:81"}
    assert (await addresses(["localhost:80"]))["127.0.0.1:80"] == "localhost:80"
    assert await addresses([]) == {}


@pytest.mark.parametrize("seed", ["no-such-host.invalid:80", "a..b:80", f"{'x' * 70}.local:80"])
async def test_a_name_that_is_not_known_has_no_address(seed: str) -> None:
    assert list(await addresses([seed, "127.0.0.1:80"])) == ["127.0.0.1:80"]


async def test_there_are_only_so_many_addresses() -> None:
    assert len(await addresses([f"127.0.1.{number}:80" for number in range(100)])) == 64


@pytest.mark.parametrize("listen", ["localhost:80", "no-such-host.invalid:80", "a..b:80"])
async def test_a_name_that_leads_to_this_host_alone_is_kept(listen: str) -> None:
    assert await own_address(listen) == listen


async def test_an_address_that_others_can_dial_is_itself() -> None:
    assert await own_address("192.0.2.1:80") == "192.0.2.1:80"


async def test_a_seed_that_leads_to_this_node_is_not_looked_up() -> None:
    seeds = Seeds(["127.0.0.1:80", "127.0.0.2:80"], own=("127.0.0.1:80",))

    assert seeds.foreign() == await seeds.find() == ["127.0.0.2:80"]
    seeds.leads_back("127.0.0.2:80")
    assert seeds.foreign() == []
    assert seeds.is_own("127.0.0.2:80")


async def test_an_address_is_known_by_its_seed() -> None:
    seeds = Seeds(["localhost:80"], own=())
    assert "127.0.0.1:80" in await seeds.find()

    assert seeds.at("127.0.0.1:80") == "localhost:80"
    assert seeds.at("192.0.2.1:80") == "192.0.2.1:80"
