"""What the daemon can listen on: addresses, names and Unix sockets, each by one daemon at a time."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from clusters import free_ports
from probes import is_answered
from processes import Daemon, mnemosyned

from mnemosyned.transport.acceptor import open_sockets

pytestmark = pytest.mark.timeout(60)
ENGINES = ["h2", "grpcio"]


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_addresses_of_each_kind_are_listened_on(engine: str, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this host has no IPv6")
    with Daemon("-storage=memory", f"-host={host}", f"-grpc.engine={engine}") as daemon:
        assert is_answered(daemon.serving().address)
        assert daemon.http("/healthz")[0] == 200
        assert daemon.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_unix_socket_is_listened_on_and_the_admin_port_is_one_of_tcp(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    with socket.socket(socket.AF_UNIX) as left:
        # As a process that was killed leaves it.
        left.bind(str(path))
    (port,) = free_ports(1)
    flags = ["-storage=memory", f"-host=unix:{path}", f"-grpc.engine={engine}", f"-port={port}"]
    with Daemon(*flags) as daemon:
        assert daemon.serving().address == f"unix:{path}"
        assert daemon.admin == f"http://127.0.0.1:{port + 1}"
        assert is_answered(daemon.address)
        assert stat.S_ISSOCK(path.stat().st_mode)
        code, _, err = mnemosyned(*flags[:-1], "-port=0")
        assert (code, err.count("\n")) == (1, 1)
        assert f"cannot listen on unix:{path}: Address already in use" in err
        assert is_answered(daemon.address)
        # With a flag: a daemon that another test has left to process 1 is not looked at then.
        done = subprocess.run(
            [sys.executable, "-m", "mnemosyned.commands.healthcheck", f"-port={port}"],
            check=False,
            env=os.environ | {"MNEMOSYNED_HOST": f"unix:{path}"},
        )
        assert done.returncode == 0
        assert daemon.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_no_socket_is_left_alone(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    code, _, err = mnemosyned("-storage=memory", f"-host=unix:{path}", f"-grpc.engine={engine}", "-port=0")

    assert (code, err.count("\n")) == (1, 1)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_daemon_on_a_port_ends_with_one_line(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon:
        port = daemon.serving().address.rpartition(":")[2]
        for other in ENGINES:
            code, _, err = mnemosyned("-storage=memory", f"-port={port}", f"-grpc.engine={other}")
            assert (code, err.count("\n")) == (1, 1)
            assert f"cannot listen on 127.0.0.1:{port}" in err
        assert is_answered(daemon.address)


def test_a_path_that_is_too_long_for_a_socket_is_one_line() -> None:
    path = f"/tmp/{'x' * 120}"  # noqa: S108  # nothing is made there
    code, _, err = mnemosyned("-storage=memory", f"-host=unix:{path}", "-port=0")

    assert (code, err.count("\n")) == (1, 1), err
    assert f"cannot listen on unix:{path}: " in err


async def test_an_address_that_this_host_lacks_is_left_out_if_there_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ["127.0.0.1", "192.0.2.1"]

    async def resolve(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    (opened,) = await open_sockets("name.example", 0)
    with opened:
        assert opened.getsockname()[0] == "127.0.0.1"
    del found[0]
    with pytest.raises(OSError, match="Cannot assign"):
        await open_sockets("name.example", 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a namespace")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("host", ["both.test", "::", "six.test", "four.test"])
def test_both_ports_listen_on_every_address_of_the_host(engine: str, host: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 both.test four.test\n::1 both.test six.test\n")
    expected = {"four.test": [True, False], "six.test": [False, True]}.get(host, [True, True])
    for port in (0, free_ports(2)[0]):
        with Daemon(
            "-storage=memory",
            f"-grpc.engine={engine}",
            f"-host={host}",
            f"-port={port}",
            prefix=with_hosts(hosts),
        ) as daemon:
            daemon.serving()
            for where in (daemon.address, daemon.admin):
                number = int(where.rpartition(":")[2])
                assert [accepts(one, number) for one in ("127.0.0.1", "::1")] == expected
            assert daemon.stop() == 0


def with_hosts(hosts: Path) -> list[str]:
    """Return the words before a command that is to see another /etc/hosts."""
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    return ["unshare", "--mount", "/bin/sh", "-c", script, str(hosts)]


def accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False
