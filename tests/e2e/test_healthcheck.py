"""The health check of a container finds the daemon where it listens, whatever says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority
from clusters import free_ports
from secrecy import CANARY

CHECK = f"{sys.executable} -m mnemosyned.commands.healthcheck"
DAEMON = f"{sys.executable} -m mnemosyned -storage=memory"
needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a PID namespace")


def in_a_container(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script as process 1 sees its container: processes of its own, and nothing of the host's."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "/bin/sh", "-c", script]
    return subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False
    )


def until_alive(check: str = CHECK) -> str:
    return f"for i in $(seq 100); do {check} 2>/dev/null && echo alive && exit 0; sleep 0.1; done; {check}"


@needs_namespaces
@pytest.mark.parametrize("way", ["flags", "environment", "file", "secret flag", "ipv6", "host"])
def test_it_asks_where_the_daemon_listens(tmp_path: Path, way: str) -> None:
    port = free_ports(2)[0]
    file = tmp_path / "config.yaml"
    file.write_text(f"port: {port}\ncluster.secret: {CANARY}-of-32-characters-at-least\n")
    flags, environ = {
        "flags": (f"-port {port}", {}),
        "environment": ("", {"MNEMOSYNED_PORT": str(port)}),
        "file": (f"-config={file}", {}),
        "secret flag": (
            f"-port={port} -token.key.file= -cluster.secret={CANARY}-of-32-characters-at-least",
            {},
        ),
        "ipv6": (f"-host=::1 -port={port}", {}),
        "host": (f"-host=127.0.0.7 -port={port}", {}),
    }[way]
    done = in_a_container(f"{DAEMON} {flags} 2>{tmp_path}/log & {until_alive()}", **environ)

    assert (done.returncode, done.stdout) == (0, "alive\n"), (done.stderr, (tmp_path / "log").read_text())


@needs_namespaces
def test_it_asks_over_tls_if_the_daemon_speaks_it(tmp_path: Path) -> None:
    port = free_ports(2)[0]
    flags = " ".join([*Authority(tmp_path).flags("node.example"), "-tls.client-auth=require"])
    done = in_a_container(f"{DAEMON} {flags} -port={port} 2>/dev/null & {until_alive()}")

    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@needs_namespaces
def test_without_a_daemon_it_says_so_in_one_line() -> None:
    port = free_ports(1)[0]
    done = in_a_container(f"{CHECK} -port={port}")

    assert done.returncode == 1
    assert done.stderr.startswith("mnemosyned: not alive: ")
    assert len(done.stderr.splitlines()) == 1
