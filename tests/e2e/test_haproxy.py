"""HAProxy in front of three nodes, configured as in deploy/: it balances calls, and a restart fails none."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from clusters import Cluster, Load, free_ports, until

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]


@contextmanager
def balancing(cluster: Cluster, directory: Path) -> Iterator[str]:
    """Run HAProxy in front of these nodes; lend its address."""
    (port,) = free_ports(1)
    text = (ROOT / "deploy" / "haproxy.cfg").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for example, name in zip((8080, 8082, 8084), cluster.names, strict=True):
        own = int(name.rpartition(":")[2])
        text = text.replace(f"127.0.0.1:{example} check port {example + 1}", f"{name} check port {own + 1}")
    (directory / "haproxy.cfg").write_text(text)
    with subprocess.Popen(["haproxy", "-f", str(directory / "haproxy.cfg")]) as process:
        try:
            end_s = time.monotonic() + 10
            while time.monotonic() < end_s:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def answered(cluster: Cluster, name: str) -> float:
    _, page = cluster.daemons[name].http("/metrics")
    wanted = 'grpc_server_requests_total{code="OK",handler="Get",service="mnemosynerpc.SessionManager"'
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(wanted))


async def test_calls_are_balanced_and_none_fails_while_each_node_restarts(
    postgres_dsn: str, tmp_path: Path
) -> None:
    with Cluster(postgres_dsn, 3) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        with balancing(cluster, tmp_path) as address:
            async with Load([address], rate=300.0) as load:
                await until(lambda: all(answered(cluster, name) > 50 for name in cluster.names))
                for name in cluster.names:
                    assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
                    await asyncio.to_thread(cluster.launch(name).serving)
                    await cluster.rings_equal(cluster.names)
                    await until(lambda name=name: answered(cluster, name) > 20)  # type: ignore[misc]

        assert not load.outcome.failures, load.outcome.report
