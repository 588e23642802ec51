from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"mnemosyned", "cluster", "cache", "http2", "aio", "mnemosynerpc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel in a copy, so that nothing an earlier build left behind can get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out, dirs_exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source]
    subprocess.run(command, check=True, timeout=120)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_holds_our_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}

    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert not [name for name in names if "test" in name or name.endswith(".proto")]


@pytest.mark.slow
def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(base).as_posix()
        for package in PACKAGES
        for base in (ROOT, ROOT / "client")
        for path in (base / package).rglob("*.py")
    }

    assert sources <= set(wheel.namelist())


@pytest.mark.slow
def test_the_scripts_of_redis_are_shipped(wheel: zipfile.ZipFile) -> None:
    directory = ROOT / "mnemosyned" / "storage" / "redis" / "scripts"
    scripts = {path.relative_to(ROOT).as_posix() for path in directory.glob("*.lua")}

    assert scripts
    assert scripts <= set(wheel.namelist())


@pytest.mark.slow
def test_types_are_shipped(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())
    assert "mnemosynerpc/session_pb2.pyi" in wheel.namelist()


@pytest.mark.slow
def test_the_command_is_installed_and_no_index_takes_the_application(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]

    assert "mnemosyned = mnemosyned.__main__:main" in wheel.read(entry_points).decode()
    assert "Classifier: Private :: Do Not Upload" in wheel.read(metadata).decode()


def test_the_lock_has_every_direct_requirement() -> None:
    lock = (ROOT / "requirements.lock").read_text().lower().replace("_", "-")
    locked = set(re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE))
    section = (ROOT / "setup.cfg").read_text()
    block = section.partition("install_requires =")[2].partition("[options.entry_points]")[0]
    wanted = set(re.findall(r"^    ([A-Za-z0-9_-]+)[\[>=]", block, re.MULTILINE))

    assert {"asyncpg", "pytest", "zttp"} <= {name.lower() for name in wanted}
    assert {name.lower().replace("_", "-") for name in wanted} <= locked
