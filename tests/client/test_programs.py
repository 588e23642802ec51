"""The example and the reader, where something is wrong: one line says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from clusters import free_ports
from processes import Daemon, mnemosyned
from secrecy import CANARY, search


def run(program: str, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", f"mnemosynerpc.{program}", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    search(done.stdout + done.stderr, f"the output of the {program}")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("program", "start"), [("example", "make run"), ("reader", "make cluster")])
def test_without_a_server_a_program_says_in_one_line_what_to_start(program: str, start: str) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"

    code, out, err = run(program, address)

    assert (code, out) == (1, "")
    assert f"no server answers; start one with `{start}`" in err
    assert address in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("example", ["nowhere"]),
        ("example", [":8080"]),
        ("example", ["localhost:http"]),
        ("example", ["localhost:70000"]),
        ("example", ["127.0.0.1:8080", CANARY]),
        ("example", ["--help"]),
        ("reader", ["localhost:8080"]),
        ("reader", ["127.0.0.1:8080,"]),
        ("reader", ["127.0.0.1:8080", "a-while"]),
        ("reader", ["127.0.0.1:8080", "1", CANARY]),
    ],
)
def test_a_wrong_argument_is_one_line_of_usage(program: str, arguments: list[str]) -> None:
    code, out, err = run(program, *arguments)

    assert (code, out) == (2, "")
    assert err.startswith(f"usage: python -m mnemosynerpc.{program} [")
    assert len(err.splitlines()) == 1


def test_a_refused_call_is_one_line_with_the_servers_words(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(mnemosyned("key")[1].splitlines()[1])
    with Daemon("-storage=memory", f"-auth.keys={keys}") as daemon:
        code, out, err = run("example", daemon.serving().address)

    assert (code, out) == (1, "")
    assert err.startswith("the server refused a call: UNAUTHENTICATED mnemosyned: ")
    assert len(err.splitlines()) == 1
