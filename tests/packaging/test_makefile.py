"""What `make run` says on first use, with a Python that only pretends."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from environments import ROOT

# It makes a .venv of copies of itself, and says what it is asked to do.
PYTHON = """#!/bin/sh
case "$*" in
    -c*) echo {version};;
    "-m venv"*) mkdir -p .venv/bin; for name in python pip mnemosyned; do cp "$0" .venv/bin/$name; done;;
    *) echo "$(basename "$0") $*";;
esac
"""


def make(tmp_path: Path, version: str, *arguments: str) -> tuple[int, list[str]]:
    for name in ("Makefile", "setup.cfg", "requirements.lock"):
        # With its times, or make would find them changed.
        shutil.copy2(ROOT / name, tmp_path)
    python = tmp_path / "python-of-a-test"
    python.write_text(PYTHON.format(version=version))
    python.chmod(0o755)
    command = ["make", "-C", tmp_path, "--no-print-directory", "PYTHON=./python-of-a-test", *arguments]
    # Without what a `make test` around this one hands down.
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "ARGS", "MFLAGS"))
    }
    done = subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("version", ["2.7.18", "3.9.2", "3.10.12"])
@pytest.mark.parametrize("target", ["run", "test"])
def test_an_old_python_is_one_line_and_nothing_is_made(tmp_path: Path, version: str, target: str) -> None:
    code, lines = make(tmp_path, version, target)

    assert code == 2
    assert len(lines) == 1
    assert f"needs Python 3.11 or newer, but ./python-of-a-test is {version}: " in lines[0]
    assert "make run PYTHON=python3.12" in lines[0]
    assert not (tmp_path / ".venv").exists()


def test_a_python_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, lines = make(tmp_path, "3.12.1", "run", "PYTHON=python3.99")

    assert (code, len(lines)) == (2, 1)
    assert "no Python runs as python3.99: choose another one, as in: make run PYTHON=" in lines[0]


@pytest.mark.parametrize("version", ["3.11.0", "3.12.1", "3.20.0", "4.0.0"])
def test_the_first_run_says_what_it_does_before_it_does_it(tmp_path: Path, version: str) -> None:
    code, (first, *_, pip, daemon) = make(tmp_path, version, "run")

    assert code == 0
    assert f"Installing mnemosyned into .venv with ./python-of-a-test ({version}), once." in first
    assert "downloads up to 40 MB and takes about one minute" in first
    assert pip.startswith("python -m pip install ")
    assert "--quiet" not in pip
    assert daemon.startswith("mnemosyned -log.environment=development -postgres.address=embedded:")


def test_a_second_run_says_nothing_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, "3.12.1", "run")
    _, lines = make(tmp_path, "3.12.1", "run")

    assert len(lines) == 1
    assert lines[0].startswith("mnemosyned ")


def test_a_venv_that_is_there_needs_no_other_python(tmp_path: Path) -> None:
    make(tmp_path, "3.12.1", "run")
    (tmp_path / ".venv" / "run.stamp").unlink()
    code, (first, *_) = make(tmp_path, "3.10.12", "run")

    assert code == 0
    assert first.startswith("Installing mnemosyned into .venv. ")


def test_make_node_names_the_node(tmp_path: Path) -> None:
    make(tmp_path, "3.12.1", "run")

    assert make(tmp_path, "3.12.1", "node", "N=2")[1] == ["python deploy/local_cluster.py node 2"]
