"""Signals to a daemon: what is read again on SIGHUP, what a closed terminal does, and what ends it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from clusters import Cluster
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import UNKNOWN
from processes import Daemon
from secrecy import CANARY

from mnemosyned.security.api_keys import Role, line_of, new_key

pytestmark = pytest.mark.timeout(120)


def write(file: Path, text: str) -> Path:
    file.touch(mode=0o600)
    file.write_text(f"{text}\n")
    return file


def hung_up(daemon: Daemon, event: str) -> dict[str, Any]:
    """Send SIGHUP; return the line that says what came of it."""
    daemon.process.send_signal(signal.SIGHUP)
    return daemon.wait_for(event)


def test_sighup_reads_files_again_and_says_what_needs_a_restart(tmp_path: Path) -> None:
    key = new_key()
    keys = write(tmp_path / "keys", line_of(new_key(), Role.ADMIN))
    tokens = write(tmp_path / "tokens", f"{CANARY}-0123456789abcdef0123456789abcdef")
    config = write(tmp_path / "mnemosyned.toml", 'ttl = "10m"\nlog.level = "info"')
    authority = Authority(tmp_path / "ours")
    flags = [f"-auth.keys={keys}", f"-config={config}", f"-token.key.file={tokens}"]
    with Daemon("-storage=memory", *flags, *authority.flags("127.0.0.1")) as daemon:
        daemon.serving()
        before = keys.stat().st_mtime_ns
        # As long as before, and no newer: only SIGHUP can tell.
        write(keys, line_of(key, Role.ADMIN))
        os.utime(keys, ns=(before, before))
        authority.issue("127.0.0.1")
        write(tokens, f"{CANARY}-fedcba9876543210fedcba9876543210")
        write(config, 'ttl = "20m"\nlog.level = "debug"\ngrpc.max-streams = 7')
        line = hung_up(daemon, "reloaded")
        with grpc.secure_channel(daemon.address, authority.credentials()) as channel:
            stub: Any = SessionManagerStub(channel)
            stub.Exists(UNKNOWN, timeout=5, metadata=[("x-api-key", key)])

        assert line["level"] == "info"
        assert set(line["taken"]) == {"tls", "keys", "log.level"}
        assert set(line["need_restart"]) == {"ttl", "grpc.max-streams", "token.key.file"}
        assert daemon.stop() == 0
    assert '"level": "debug"' in daemon.log


def test_sighup_keeps_what_was_in_use_where_a_file_is_wrong(tmp_path: Path) -> None:
    key = new_key()
    keys = write(tmp_path / "keys", line_of(key, Role.ADMIN))
    config = write(tmp_path / "mnemosyned.toml", 'ttl = "10m"')
    with Daemon("-storage=memory", f"-auth.keys={keys}", f"-config={config}") as daemon:
        daemon.serving()
        write(keys, f"no role {CANARY}")
        write(config, 'ttl = "never"')
        # Each time, not only the first time.
        lines = [hung_up(daemon, "reload_refused") for _ in range(2)]
        with daemon.stub() as stub:
            stub.Exists(UNKNOWN, timeout=5, metadata=[("x-api-key", key)])
        write(keys, line_of(key, Role.ADMIN))
        write(config, 'ttl = "10m"')
        mended = hung_up(daemon, "reloaded")

        for line in lines:
            assert line["level"] == "error"
            assert f"{keys}, line 1" in line["error"]
            assert "flag -ttl" in line["error"]
        assert mended["need_restart"] == []
        assert "Traceback" not in daemon.log
        assert daemon.stop() == 0


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_a_secret_of_the_cluster_is_rotated_by_sighup_alone(
    engine: str, postgres_dsn: str, tmp_path: Path
) -> None:
    old, new = f"{CANARY}-{'1' * 32}", f"{CANARY}-{'2' * 32}"
    file = write(tmp_path / "secret", old)
    flags = [f"-cluster.secret.file={file}", f"-grpc.engine={engine}"]
    with Cluster(postgres_dsn, 2, *flags) as cluster:
        cluster.secret = ""
        cluster.start()
        asyncio.run(cluster.rings_equal(cluster.names))
        one, other = (cluster.daemons[name] for name in cluster.names)
        with one.stub() as stub:
            tokens = [
                stub.Start(StartRequest(session=Session(subject_id="s"))).session.access_token
                for _ in range(20)
            ]
            for words in (f"{old}\n{new}", f"{new}\n{old}", new):
                write(file, words)
                for daemon in (one, other):
                    assert hung_up(daemon, "reloaded")["taken"] == ["cluster.secret"]
                    for token in tokens:
                        stub.Get(GetRequest(access_token=token), timeout=5)
            failed = [line for line in one.http("/metrics")[1].splitlines() if _is_failed_forward(line)]
        for name in cluster.names:
            assert sorted(cluster.ring(name)) == sorted(cluster.names)

        assert failed == []
        assert [daemon.stop() for daemon in (one, other)] == [0, 0]
        assert "member_suspected" not in one.log + other.log


def _is_failed_forward(line: str) -> bool:
    return (
        line.startswith("mnemosyned_cluster_forwards_total")
        and 'outcome="ok"' not in line
        and not line.endswith(" 0.0")
    )


def test_sighup_reloads_while_the_storage_is_awaited(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", line_of(new_key(), Role.ADMIN))
    nowhere = "postgres://nobody@127.0.0.1:1/none?sslmode=disable"
    with Daemon(f"-postgres.address={nowhere}", f"-auth.keys={keys}") as daemon:
        daemon.wait_for("storage_not_ready")

        assert "keys" in hung_up(daemon, "reloaded")["taken"]
        assert daemon.stop() == 0


def test_sighup_follows_the_address_of_the_storage_in_its_file(postgres_dsn: str, tmp_path: Path) -> None:
    file = write(tmp_path / "address", postgres_dsn)
    with Daemon(f"-postgres.address.file={file}") as daemon, daemon.serving().stub() as stub:
        write(file, f"{postgres_dsn}?application_name=other")
        line = hung_up(daemon, "reloaded")
        write(file, f"mysql://{CANARY}")
        refused = hung_up(daemon, "reload_refused")
        stub.Exists(UNKNOWN, timeout=5)

        assert line["taken"] == ["postgres_address"]
        assert line["need_restart"] == []
        assert refused["error"].count(str(file)) == 1
        assert daemon.stop() == 0


# A terminal.

_ON_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def terminal() -> Iterator[tuple[int, list[str]]]:
    """Lend a terminal's other end, and what runs a program as its session's leader."""
    other_end, end = pty.openpty()
    try:
        yield other_end, [sys.executable, "-c", _ON_TERMINAL, os.ttyname(end)]
    finally:
        os.close(end)
        with suppress(OSError):
            os.close(other_end)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems differ")
def test_a_terminal_that_closes_drains_the_daemon() -> None:
    with terminal() as (other_end, prefix), Daemon("-storage=memory", prefix=prefix) as daemon:
        daemon.serving()
        os.close(other_end)
        daemon.wait_for("terminal_closed")
        daemon.wait_for("draining")

        assert daemon.end() == 0
        assert daemon.lines[-1].count('"stopped"') == 1


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems differ")
def test_sighup_reloads_a_daemon_whose_terminal_is_there() -> None:
    with terminal() as (_, prefix), Daemon("-storage=memory", prefix=prefix) as daemon:
        daemon.serving()

        assert hung_up(daemon, "reloaded")["level"] == "info"
        assert daemon.stop() == 0


def test_sighup_stays_ignored_under_nohup() -> None:
    with Daemon("-storage=memory", prefix=["nohup"]) as daemon:
        daemon.serving()
        daemon.process.send_signal(signal.SIGHUP)
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.wait_for("signal_ignored")

        assert "reloaded" not in daemon.log
        assert daemon.stop() == 0


# Other signals.


def test_signals_without_a_meaning_end_nothing() -> None:
    with Daemon("-storage=memory") as daemon, daemon.serving().stub() as stub:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE):
            daemon.process.send_signal(number)
            if number != signal.SIGPIPE:
                assert daemon.wait_for("signal_ignored")["signal"] == number.name
        stub.Exists(UNKNOWN, timeout=5)

        assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_drain_lasts_when_sigterm_is_sent_once_more(number: signal.Signals) -> None:
    with Daemon("-storage=memory", "-drain.delay=1s") as daemon, daemon.serving().stub() as stub:
        stub.Exists(UNKNOWN, timeout=5)
        daemon.process.send_signal(number)
        daemon.wait_for("draining")
        for _ in range(3):
            daemon.process.send_signal(signal.SIGTERM)
            daemon.process.send_signal(signal.SIGHUP)
            stub.Exists(UNKNOWN, timeout=5)

        assert daemon.end() == 0
        assert json.loads(daemon.lines[-1])["msg"] == "stopped"


def test_a_daemon_that_was_stopped_drains_when_it_goes_on() -> None:
    with Daemon("-storage=memory") as daemon:
        daemon.serving()
        daemon.process.send_signal(signal.SIGSTOP)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.process.send_signal(signal.SIGCONT)

        assert daemon.end() == 0
        assert json.loads(daemon.lines[-1])["msg"] == "stopped"


@pytest.mark.parametrize("after_s", [0.3, 0.45, 0.6, 0.75, 0.9])
def test_sigterm_at_any_time_of_a_start_leaves_no_traceback(after_s: float) -> None:
    with Daemon("-storage=memory") as daemon:
        time.sleep(after_s)
        daemon.process.send_signal(signal.SIGTERM)

        # Before its handlers are set, the process ends as any other does.
        assert daemon.end() in {0, -signal.SIGTERM}
        assert "Traceback" not in daemon.log
