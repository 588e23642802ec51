"""grpc-go, the client of Go, from Debian's packages: nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from environments import ROOT
from processes import Daemon
from secrecy import CANARY

SOURCES = Path("/usr/share/gocode")
PROGRAM = Path(__file__).with_name("client.go")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("go") is None, reason="go is not installed"),
    pytest.mark.skipif(
        not (SOURCES / "src" / "google.golang.org" / "grpc").exists(),
        reason="golang-google-grpc-dev is not installed",
    ),
]


@pytest.mark.slow
def test_each_kind_of_call_works_and_none_fails_while_connections_are_replaced(tmp_path: Path) -> None:
    program = tmp_path / "client"
    cache = ROOT / ".cache" / "go"
    environ = {"GO111MODULE": "off", "GOPATH": str(SOURCES), "GOCACHE": str(cache), "GOFLAGS": ""}
    subprocess.run(["go", "build", "-o", program, PROGRAM], check=True, env=os.environ | environ)
    with Daemon("-storage=memory") as daemon:
        done = subprocess.run(
            [program, daemon.serving().address, CANARY],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert done.stdout == "all calls answered\n", done.stderr
