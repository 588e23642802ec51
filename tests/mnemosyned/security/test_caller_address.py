from __future__ import annotations

import pytest

from mnemosyned.security.caller_address import network_of


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("192.0.2.1:5000", "192.0.2.1"),
        ("192.0.2.1:5001", "192.0.2.1"),
        ("[2001:db8:1:2:3:4:5:6]:5000", "2001:db8:1:2::/64"),
        ("%5B2001:db8:1:2::9%5D:5001", "2001:db8:1:2::/64"),
        ("[2001:db8:1:3::9]:5001", "2001:db8:1:3::/64"),
        ("[::1]:5000", "::/64"),
        ("[::ffff:192.0.2.1]:5000", "192.0.2.1"),
        ("%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
        ("[fe80::1%eth0]:5000", "fe80::/64"),
        ("[fe80::2%eb0]:5000", "fe80::/64"),
        ("%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("unix", "unix"),
        ("unix:", "unix"),
        ("unix:/run/mnemosyned.sock", "unix"),
        ("unix:/run/v1.2/mnemosyned:1", "unix"),
        ("", "unknown"),
        ("nonsense", "unknown"),
        ("[nonsense]:5000", "unknown"),
    ],
)
def test_the_port_and_the_lower_half_of_ipv6_name_no_other_caller(peer: str, network: str) -> None:
    assert network_of(peer) == network
