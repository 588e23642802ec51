from __future__ import annotations

import pytest

from cluster.addresses import AddressRules, is_address


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1:8080", "[2001:db8::1]:1", "a.b:65535", "node-0.nodes.example.:80", "LOCALHOST:1", "a_b:1"],
)
def test_host_and_port_are_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", ":1", "a:0", "a:65536", "a:²", "a:1 ", " a:1", "a b:1", "é:1", "\x1b:1", "a\n:1", "-a:1"),
        *("::1:1", "[a:1", f"{'x' * 300}:1", "a:1\n", "[::1%eth0]:1", "a/b:1", "user@a:1"),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    assert not is_address(text)


METADATA = ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200", "::ffff:169.254.169.254"]
LINKS = ["169.254.3.4", "fe80::1", "::ffff:169.254.3.4"]
NOWHERE = ["0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "ff02::1"]  # noqa: S104  # refused


@pytest.mark.parametrize("host", METADATA + LINKS + NOWHERE)
def test_a_node_is_not_dialled_where_none_should_be(host: str) -> None:
    rules = AddressRules(["10.0.0.1:8080", "seed.example:1"], own="10.0.0.2:8080")

    assert not rules.may_dial(host)
    assert not rules.may_be_node(f"[{host}]:80" if ":" in host else f"{host}:80")


@pytest.mark.parametrize(
    "host", ["10.0.0.9", "127.0.0.1", "2001:db8::1", "192.0.2.1", "seed.example", "x.example"]
)
def test_other_addresses_may_be_a_nodes(host: str) -> None:
    assert AddressRules([], own="10.0.0.2:8080").may_dial(host)


def test_where_a_seed_is_others_may_be_too() -> None:
    rules = AddressRules([], own="10.0.0.2:8080")
    rules.know(["169.254.3.4:8080"])

    assert rules.may_be_node("169.254.77.1:8080")
    assert not rules.may_be_node("169.254.169.254:80")
    assert not rules.may_be_node("[fe80::1]:80")
    rules.know(["169.254.169.254:80"])
    assert rules.may_be_node("169.254.169.254:80")


def test_this_node_is_no_other() -> None:
    assert not AddressRules([], own="10.0.0.2:8080").may_be_node("10.0.0.2:8080")
