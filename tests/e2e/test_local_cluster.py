"""`make cluster` and `make node`: what they say when nodes die, and how they stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from clusters import free_ports
from environments import ROOT
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import mnemosyned, wait_until_gone
from redis_servers import needs_redis
from secrecy import search

SCRIPT = str(ROOT / "deploy" / "local_cluster.py")


class Program:
    """The script as a process, with its output by lines."""

    def __init__(self, environ: dict[str, str], *arguments: str) -> None:
        self._seen: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environ,
        )

    def wait_for(self, pattern: str) -> str:
        """Return the next line that has this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._seen.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self._seen)}")

    def end(self, *numbers: int) -> tuple[int, str]:
        """Send signals, if any; return the exit code and what was said since the last line waited for."""
        for number in numbers:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        search("".join(self._seen) + rest, "what make cluster prints")
        return self.process.returncode, rest


@contextmanager
def running_cluster(
    tmp_path: Path, *flags: str
) -> Iterator[tuple[Program, dict[str, str], list[int], list[int]]]:
    """Run a cluster on ports of its own: the program, its environment, the ports, the nodes' processes."""
    ports = free_ports(3)
    environ = {"XDG_DATA_HOME": str(tmp_path), "CLUSTER_PORTS": ",".join(map(str, ports))}
    program = Program(environ, *flags)
    try:
        pids = [int(program.wait_for(rf":{port}  pid ").split()[-1]) for port in ports]
        program.wait_for("stop them all")
        wait_for_nodes(ports[0], 3)
        yield program, environ, ports, pids
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGINT, signal.SIGINT)
        search((tmp_path / "mnemosyned/cluster/log").read_text(), "the log of make cluster")
        wait_until_gone(tmp_path)


def wait_for_nodes(port: int, count: int) -> None:
    deadline_s = time.monotonic() + 20
    while f"{count} nodes" not in mnemosyned("cluster", "check", "-node", f"127.0.0.1:{port}")[1]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def start_session(port: int) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        new = StartRequest(session=Session(subject_id="user:17"))
        return SessionManagerStub(channel).Start(new, timeout=5).session.access_token


def get_session(port: int, token: str) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = GetRequest(access_token=token)
        return SessionManagerStub(channel).Get(request, timeout=5).session.subject_id


def run(environ: dict[str, str], *arguments: str) -> tuple[int, str]:
    return Program(environ, *arguments).end()


@pytest.mark.slow
def test_a_node_that_dies_is_named_and_can_be_started_again(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as (cluster, environ, ports, pids):
        os.kill(pids[1], signal.SIGKILL)
        told = cluster.wait_for("node 2")
        node = Program(environ, "node", "2")
        node.wait_for("stop it  Ctrl-C")
        wait_for_nodes(ports[0], 3)
        node_end = node.end(signal.SIGINT)
        end = cluster.end(signal.SIGINT)

    assert f"node 2 (127.0.0.1:{ports[1]}, pid {pids[1]}) was ended by signal SIGKILL" in told
    assert "start it again: make node N=2" in told
    assert node_end[0] == 0
    assert end[0] == 0
    assert "stopping 2 nodes: they finish the calls in flight, for at most 10 s" in end[1]


@needs_redis
def test_all_nodes_get_the_flags_and_share_the_storage_that_they_choose(tmp_path: Path) -> None:
    # A flag may hold a secret, and a node that is started again has the same.
    with running_cluster(tmp_path, "-storage=redis", "-guess.limit=77") as (_, environ, ports, pids):
        os.kill(pids[1], signal.SIGKILL)
        node = Program(environ, "node", "2")
        log = node.wait_for('"configuration"|configuration ')
        node.wait_for("stop it  Ctrl-C")
        token = start_session(ports[0])
        found = {get_session(port, token) for port in ports}
        node.end(signal.SIGINT)
        mode = (tmp_path / "mnemosyned/cluster/running.json").stat().st_mode

    assert "77" in log
    assert found == {"user:17"}
    assert mode & 0o077 == 0
    assert (tmp_path / "mnemosyned/redis/data").exists()
    assert not (tmp_path / "mnemosyned/postgres").exists()


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("-storage=memory", "memory is for one node"),
        ("-cache.ttl=x", "flag -cache.ttl"),
        ("-help", "-help is for mnemosyned itself"),
        ("--check-config", "-check-config is for mnemosyned itself"),
    ],
)
def test_a_flag_with_which_no_cluster_can_run_is_one_line(tmp_path: Path, flag: str, reason: str) -> None:
    code, out = run({"XDG_DATA_HOME": str(tmp_path)}, flag)

    assert (code, len(out.splitlines())) == (1, 1)
    assert reason in out


@pytest.mark.slow
def test_a_second_ctrl_c_kills_nodes_that_do_not_stop(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as (cluster, _, _, pids):
        os.kill(pids[0], signal.SIGSTOP)
        cluster.process.send_signal(signal.SIGINT)
        cluster.wait_for("Ctrl-C again kills them")
        began_s = time.monotonic()
        code, _ = cluster.end(signal.SIGINT)

    assert code == 0
    assert time.monotonic() - began_s < 9
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.slow
def test_a_terminal_that_closes_stops_all_nodes_cleanly(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as (cluster, _, _, pids):
        # The kernel and the shell may both send it.
        code, end = cluster.end(signal.SIGHUP, signal.SIGHUP)
        log = (tmp_path / "mnemosyned/cluster/log").read_text()

    assert code == 0
    assert "stopping 3 nodes" in end
    assert log.count('"stopped"') == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_what_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as (_, environ, _, _):
        answers = [run(environ, *words.split()) for words in ("node 2", "node 4", "node", "")]

    words = ("node 2 runs already", "with N from 1 to 3", "with N from 1 to 3", "a cluster runs already")
    for (code, out), word in zip(answers, words, strict=True):
        assert code == 1
        assert word in out
        assert len(out.splitlines()) == 1


def test_a_node_without_its_cluster_says_what_to_start(tmp_path: Path) -> None:
    code, out = run({"XDG_DATA_HOME": str(tmp_path)}, "node", "2")

    assert (code, out) == (1, "no cluster runs here; start one with `make cluster`\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ports", ["8080", "8080,8082,http", "1,2,3,4"])
def test_ports_that_are_not_three_are_one_line(tmp_path: Path, ports: str) -> None:
    code, out = run({"XDG_DATA_HOME": str(tmp_path), "CLUSTER_PORTS": ports})

    assert (code, len(out.splitlines())) == (1, 1)
    assert "CLUSTER_PORTS" in out
