"""The client's distribution: what an application gets, with the oldest and the newest that it allows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, environment, make_every_call, run_outside
from processes import Daemon
from secrecy import search

CLIENT = ROOT / "client"
FLOORS = ("grpcio>=1.71", "protobuf>=5.29")
# By the index's own rule, 1.71 is 1.71.0.
OLDEST = [floor.replace(">=", "==") for floor in FLOORS]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel in a copy, so that nothing an earlier build left behind can get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(CLIENT, source, ignore=left_out, dirs_exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source]
    subprocess.run(command, check=True, timeout=120)
    (path,) = out.glob("*.whl")
    return path


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        return archive.read(name).decode()


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(CLIENT).as_posix()
        for package in ("mnemosyne_client", "mnemosynerpc")
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in (CLIENT / package).rglob(pattern)
    }
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}

    assert ours == sources
    assert {"mnemosynerpc/session_pb2.pyi", "mnemosynerpc/py.typed", "mnemosyne_client/py.typed"} <= ours
    assert [name for name in names if name.endswith("/LICENSE")]


@pytest.mark.slow
def test_the_wheel_requires_grpcio_and_protobuf_and_nothing_else(wheel: Path) -> None:
    assert tuple(re.findall(r"^Requires-Dist: (.+)$", metadata(wheel), re.MULTILINE)) == FLOORS


@pytest.mark.slow
def test_the_client_and_the_daemon_have_one_version(wheel: Path) -> None:
    daemon = re.search(r'__version__ = "(.+)"', (ROOT / "mnemosyned" / "__init__.py").read_text())

    assert daemon is not None
    assert f"\nVersion: {daemon[1]}\n" in metadata(wheel)
    assert "\nName: mnemosyned-client\n" in metadata(wheel)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("versions", ["oldest", "newest"])
def test_the_client_makes_every_call_with(versions: str, wheel: Path, postgres_dsn: str) -> None:
    others = OLDEST if versions == "oldest" else []
    python = environment(f"{versions}-client", *others, wheel=wheel)
    installed = run_outside(python, "-m", "pip", "freeze").stdout.split()
    with Daemon(f"-postgres.address={postgres_dsn}") as daemon:
        address = daemon.serving().address
        make_every_call(python, address)
        example = run_outside(python, "-m", "mnemosynerpc.example", address)

    # grpcio's newer versions require that one.
    names = {re.split("[=@]", line)[0] for line in installed if "==" in line or line == "mnemosyned-client"}
    assert names - {"typing_extensions"} == {"grpcio", "protobuf", "mnemosyned-client"}
    assert versions == "newest" or {"grpcio==1.71.0", "protobuf==5.29.0"} <= set(installed)
    search(example.stdout, "the example's output")
    assert (example.returncode, example.stderr) == (0, "")
    assert "Ada is logged in until" in example.stdout
    assert "after that: NOT_FOUND" in example.stdout
