"""What `ps` shows of a daemon and of a command, as /proc has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Daemon
from waiting import until

SECRET = "hunter2-on-the-command-line"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([f"-cluster.secret={SECRET}"], "-cluster.secret=…"),
        (["--cluster.secret", SECRET, "-ttl", "5m"], "--cluster.secret … -ttl 5m"),
        (["-postgres.address=postgres://u:hunter2@h/d"], "-postgres.address=…"),
    ],
)
def test_a_daemons_title_is_its_command_line_without_secrets(given: list[str], shown: str) -> None:
    with Daemon("-storage=memory", *given, environ={"SEEN": "by whom it concerns"}) as daemon:
        daemon.serving()
        process = Path(f"/proc/{daemon.process.pid}")
        title, environ = command_line(daemon.process.pid), (process / "environ").read_text()

        assert title == f"mnemosyned -port=0 -storage=memory {shown}"
        assert (process / "comm").read_text() == "mnemosyned\n"
        assert "SEEN=by whom it concerns" in environ
        assert "SPT_NOENV" not in environ


def test_a_command_line_without_secrets_stays_as_it_is() -> None:
    with Daemon("-storage=memory", "-ttl=5m") as daemon:
        daemon.serving()

        assert command_line(daemon.process.pid).split("\0")[1:] == [
            "-m", "mnemosyned", "-port=0", "-storage=memory", "-ttl=5m",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["leave", "-cluster.secret", SECRET], "leave -cluster.secret …"),
        (["whois", "hunter2-a-token"], "whois …"),
    ],
)
def test_a_commands_title_shows_neither_secret_nor_token(arguments: list[str], shown: str) -> None:
    # A node that says nothing keeps the command waiting.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = f"127.0.0.1:{silent.getsockname()[1] - 1}"
        with subprocess.Popen(
            [sys.executable, "-m", "mnemosyned", "cluster", *arguments],
            env=os.environ | {"MNEMOSYNED_CLUSTER_LISTEN": node},
            stderr=subprocess.DEVNULL,
        ) as process:
            until(lambda: command_line(process.pid) == f"mnemosyned cluster {shown}")
            process.kill()


def test_the_secrets_are_hidden_before_anything_else_is_done() -> None:
    with Daemon("-storage=memory", f"-cluster.secret={SECRET}") as daemon:
        until(lambda: command_line(daemon.process.pid).startswith("mnemosyned"))
        # Long before the modules of the daemon are there, among them this one.
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()

    assert "cygrpc" not in maps


def test_where_they_cannot_be_hidden_the_operator_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mnemosyned", "-check-config", f"-cluster.secret={SECRET}"],
        env={},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "every user here can read the command line" in done.stderr
    assert SECRET not in done.stderr
