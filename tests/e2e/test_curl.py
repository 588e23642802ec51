"""The lines of docs/curl.md do what it says, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import ROOT
from processes import Daemon
from secrecy import CANARY

DOCUMENT = (ROOT / "docs" / "curl.md").read_text()
USUAL = "127.0.0.1:8080"


def commands() -> list[str]:
    """Return the commands of all blocks that need `buf`; one may go on over several lines."""
    return [one for one in _all_commands() if "--data-binary" not in one]


def plain_commands() -> list[str]:
    """Return those that need no `buf`."""
    return [one for one in _all_commands() if "--data-binary" in one]


def _all_commands() -> list[str]:
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL))
    return [one for one in re.split(r"(?<!\\)\n+", blocks) if one.strip()]


def run(lines: list[str], home: Path) -> tuple[int, list[str], str]:
    """Run the lines in one shell; return its exit code, the output of each, and what went wrong."""
    environ = {"HOME": str(home), "BUF_CACHE_DIR": str(home), "NO_PROXY": "127.0.0.1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\nprintf '\\0'\n".join(lines)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=home,
    )
    return done.returncode, done.stdout.split("\0"), done.stderr


def test_every_call_of_the_service_is_shown() -> None:
    shown = set(re.findall(rf"{USUAL}/mnemosynerpc.SessionManager/(\w+)", "\n".join(commands())))

    assert shown == {"Start", "Get", "Exists", "SetValue", "List", "Abandon", "Delete"}


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_the_lines_work_as_they_are_written(engine: str, tmp_path: Path) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon:
        address = daemon.serving().address
        lines = [line.replace(USUAL, address).replace("Ada", f"{CANARY}-Ada") for line in commands()]
        code, (_, _, *outputs), err = run(lines, tmp_path)

    assert code == 0, err
    get, exists, bag, sessions, abandoned, deleted = (json.loads(output) for output in outputs[:6])
    assert get["session"]["subjectId"] == "user:17"
    assert (exists, abandoned, deleted) == (True, True, "0")
    assert bag == {"bag": {"name": f"{CANARY}-Ada", "theme": "dark"}}
    assert [one["accessToken"] for one in sessions["sessions"]] == [get["session"]["accessToken"]]
    assert "mnemosynerpc.SessionManager/Start" in outputs[6]


def test_a_get_of_an_ended_session_fails_as_the_document_says(tmp_path: Path) -> None:
    (get,) = [line for line in commands() if line.endswith("/Get")]
    with Daemon("-storage=memory") as daemon:
        line = get.replace(USUAL, daemon.serving().address).replace("$TOKEN", CANARY)
        code, _, err = run([line], tmp_path)

    assert code == 40
    assert json.loads(err)["code"] == "not_found"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_plain_curl_ends_as_the_document_says(tmp_path: Path) -> None:
    with Daemon("-storage=memory") as daemon:
        url = f"http://{daemon.serving().address}/"
        command = "curl --silent --show-error --write-out '%{http_code}'"
        plain = run([f"{command} {url}"], tmp_path)
        http2 = run([f"{command} --http2-prior-knowledge {url}"], tmp_path)

    assert (plain[0], http2[0]) == (0, 0)
    assert plain[1][0].startswith("mnemosyned speaks gRPC (HTTP/2) here")
    assert plain[1][0].endswith("\n505")
    assert http2[1][0].startswith("mnemosyned speaks gRPC here")
    assert http2[1][0].endswith("\n405")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_plain_curl_makes_a_call_as_the_document_says(engine: str, tmp_path: Path) -> None:
    (line,) = plain_commands()
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon:
        code, (answer,), err = run([line.replace(USUAL, daemon.serving().address)], tmp_path)

    assert code == 0, err
    assert answer.split() == ["00"] * 5
