"""A cluster in a network that has IPv6 only: its ports, peers, seeds, commands and health check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from clusters import SECRET
from networks import run
from processes import Daemon
from serving import ENGINES

from mnemosyned.transport.engine import host_port

HOSTS = """127.0.0.1 localhost
fd00:6d6e::1 one.test nodes.test
fd00:6d6e::2 two.test nodes.test
192.0.2.1 two.test
"""
ADDRESSES = ("fd00:6d6e::1", "fd00:6d6e::2")
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"
)


@pytest.fixture(scope="module")
def inside() -> Iterator[list[str]]:
    """Return the words before a command that is to run where all but loopback is IPv6."""
    name = f"mn6-{os.getpid()}"
    files = Path("/etc/netns") / name
    words = ["ip", "netns", "exec", name]
    run("ip", "netns", "add", name)
    try:
        files.mkdir(parents=True)
        (files / "hosts").write_text(HOSTS)
        run(*words, "ip", "link", "set", "lo", "up")
        run(*words, "ip", "link", "add", "eth0", "type", "bridge")
        run(*words, "ip", "link", "set", "eth0", "up")
        for address in ADDRESSES:
            run(*words, "ip", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        yield words
    finally:
        run("ip", "netns", "delete", name)
        shutil.rmtree(files)


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_form_a_cluster_and_commands_reach_them(inside: list[str], engine: str, tmp_path: Path) -> None:
    python = [*inside, sys.executable, "-m"]
    mnemosyned = [*python, "mnemosyned"]
    common = [
        f"-grpc.engine={engine}",
        f"-postgres.address=embedded:{tmp_path}/pg",
        "-cluster.seeds=nodes.test:8090",
        f"-cluster.secret={SECRET}",
        "-cluster.plaintext",
        "-port=8080",
    ]
    # One node is known by an address, the other by a name whose address of IPv4 does not answer.
    first = ["-cluster.listen=[fd00:6d6e::1]:8090", "-cluster.bind=[fd00:6d6e::1]:8090", "-host=fd00:6d6e::1"]
    second = ["-cluster.listen=two.test:8090", "-cluster.bind=[fd00:6d6e::2]:8090", "-host=fd00:6d6e::2"]
    with ExitStack() as stack:
        one = stack.enter_context(Daemon(*common, *first, prefix=inside))
        one.serving()
        two = stack.enter_context(Daemon(*common, *second, prefix=inside))
        assert two.serving().address == "[fd00:6d6e::2]:8080"
        where = ("-node=[fd00:6d6e::1]:8090", "-admin-port=8081")
        until_s = time.monotonic() + 20
        while not said(*mnemosyned, "cluster", "check", *where).startswith("2 nodes, "):
            assert time.monotonic() < until_s
        assert said(*mnemosyned, "cluster", "members", *where).count(" active ") == 2
        for host in (ADDRESSES[0], "two.test"):
            said(*python, "mnemosyned.commands.healthcheck", f"-host={host}", "-port=8080")
            said(*python, "mnemosynerpc.example", host_port(host, 8080))
        assert two.stop() == one.stop() == 0
