"""Completion of flags and commands, in real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyned.commands import COMMANDS
from mnemosyned.config.help import completion_script
from mnemosyned.settings import FLAGS, SECTIONS

needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")


def script(shell: str, tmp_path: Path) -> Path:
    path = tmp_path / f"completion.{shell}"
    path.write_text(completion_script(shell, SECTIONS, COMMANDS))
    return path


def run(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def bash(path: Path, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in ("mnemosyned", *words))
    code = (
        f"source {path}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _mnemosyned; echo ${{COMPREPLY[@]}}"
    )
    return run("bash", "-c", code)


def zsh(path: Path, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in ("mnemosyned", *words))
    # Outside the line editor there is nothing to add to: print what would be added.
    code = (
        "compadd() { shift; print -l -- $@ }; compset() { : }; _files() { print FILES }; "
        f"source {path}; words=({quoted}); CURRENT={len(words) + 1}; PREFIX='{words[-1]}'; _mnemosyned"
    )
    return run("zsh", "-fc", code)


def test_bash_completes_flags_commands_and_the_words_of_a_flag(tmp_path: Path) -> None:
    path = script("bash", tmp_path)

    assert bash(path, "-stor") == ["-storage"]
    assert set(bash(path, "")) >= {f"-{name}" for name in FLAGS} | set(COMMANDS) | {"-help", "-config"}
    assert bash(path, "-ttl", "5m", "-clus") == [f"-{name}" for name in FLAGS if name.startswith("clus")]
    assert bash(path, "-storage", "") == ["postgres", "redis", "mongodb", "memory"]
    assert bash(path, "--grpc.engine", "h2") == ["h2"]
    assert bash(path, "-tls", "=", "f") == ["false"]


def test_bash_completes_the_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "node.pem").touch()

    assert bash(script("bash", tmp_path), "-tls.crt", f"{tmp_path}/no") == [f"{tmp_path}/node.pem"]


@needs_zsh
def test_zsh_completes_flags_commands_and_the_words_of_a_flag(tmp_path: Path) -> None:
    path = script("zsh", tmp_path)

    assert set(zsh(path, "")) >= {f"-{name}" for name in FLAGS} | set(COMMANDS) | {"-help", "-config"}
    assert not set(zsh(path, "-ttl", "5m", "-")) & set(COMMANDS)
    assert zsh(path, "-storage", "") == ["postgres", "redis", "mongodb", "memory"]
    assert zsh(path, "-storage=") == ["postgres", "redis", "mongodb", "memory"]
    assert zsh(path, "--tls", "") == ["true", "false"]
    assert zsh(path, "-tls.crt", "") == ["FILES"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_the_script(shell: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnemosyned", "completion", shell]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert out == script(shell, tmp_path).read_text()


def test_an_unknown_shell_is_refused_and_the_known_ones_are_named() -> None:
    command = [sys.executable, "-m", "mnemosyned", "completion", "fish"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "choose from 'bash', 'zsh'" in done.stderr.splitlines()[-1]
