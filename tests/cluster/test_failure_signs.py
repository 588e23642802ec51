"""What a dial of a member tells. Signs and dials of a node's members are in test_gossip.py."""

from __future__ import annotations

import socket

from clusters import free_ports

from cluster.failure_signs import is_refused


async def test_only_a_host_that_says_so_has_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not await is_refused(f"127.0.0.1:{listener.getsockname()[1]}")
    assert await is_refused(f"127.0.0.1:{free_ports(1)[0]}")
    assert not await is_refused("no-such-host.invalid:80")
