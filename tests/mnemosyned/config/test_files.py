"""Which files are read, and which are refused with one line: by kind, by users, by size and by content."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemosyned.config.files import (
    MAX_BYTES,
    FileRefused,
    exposure_of,
    read_bytes,
    text_of,
    words_of,
)

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="gives files to other users")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("content")
    file.chmod(0o600)
    return file


def refusal(path: Path, *, holds_secret: bool = True) -> str:
    with pytest.raises(FileRefused) as caught:
        read_bytes(str(path), holds_secret=holds_secret)
    text = str(caught.value)
    assert "\n" not in text
    assert "content" not in text
    return text


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700, 0o640, 0o444])
def test_a_file_that_only_its_user_may_write_is_read(path: Path, mode: int) -> None:
    path.chmod(mode)

    assert read_bytes(str(path), holds_secret=True) == b"content"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777, 0o660])
@pytest.mark.parametrize("holds_secret", [True, False])
def test_a_file_that_others_may_write_is_refused_with_the_remedy(
    path: Path, mode: int, *, holds_secret: bool
) -> None:
    path.chmod(mode)

    assert f"chmod go-w {path}" in refusal(path, holds_secret=holds_secret)


@needs_root
def test_a_secret_of_a_third_user_is_refused_and_another_file_is_not(path: Path) -> None:
    os.chown(path, 65534, 65534)

    assert "belongs to another user (65534)" in refusal(path)
    assert read_bytes(str(path), holds_secret=False) == b"content"


@needs_root
def test_a_file_of_root_may_be_read_by_its_group_alone(path: Path) -> None:
    path.chmod(0o440)
    assert exposure_of(str(path)) is None
    path.chmod(0o444)
    found = exposure_of(str(path))

    assert found is not None
    assert found.event == "secret_file_readable_by_others"
    assert found.advice == f"chmod 600 {path}"


@needs_root
def test_another_users_daemon_is_told_how_to_read_a_file_of_root(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    monkeypatch.setattr(os, "getegid", lambda: 65532)
    path.chmod(0o444)
    apart = exposure_of(str(path))
    os.chown(path, 0, 65532)
    together = exposure_of(str(path))
    path.chmod(0o440)

    assert apart is not None
    assert apart.advice == f"chgrp 65532 {path} && chmod 640 {path}"
    assert together is not None
    assert together.advice == f"chmod 640 {path}"
    assert read_bytes(str(path), holds_secret=True) == b"content"
    assert exposure_of(str(path)) is None


@needs_root
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_users_own_file_that_others_may_read_is_a_warning(
    path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(path, 65532, 65532)
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    path.chmod(mode)
    found = exposure_of(str(path))

    assert found is not None
    assert found.advice == f"chmod 600 {path}"


def test_links_as_kubernetes_mounts_them_are_followed(tmp_path: Path) -> None:
    version = tmp_path / "..2026_11_25"
    version.mkdir()
    (version / "secret").write_text("content")
    (version / "secret").chmod(0o440 if IS_ROOT else 0o400)
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "secret").symlink_to("..data/secret")
    tmp_path.chmod(0o1777)

    assert read_bytes(str(tmp_path / "secret"), holds_secret=True) == b"content"
    assert exposure_of(str(tmp_path / "secret")) is None
    (version / "secret").chmod(0o666)
    assert "other users may write it" in refusal(tmp_path / "secret")


def test_a_directory_in_which_all_may_replace_the_file_is_a_warning(path: Path) -> None:
    path.parent.chmod(0o777)
    found = exposure_of(str(path))

    assert found is not None
    assert found.event == "secret_file_replaceable_by_others"
    assert found.advice == f"chmod o-w {path.parent}"
    assert read_bytes(str(path), holds_secret=True) == b"content"


def test_the_advice_is_a_command_for_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "a file; rm -rf x"
    path.write_text("content")
    path.chmod(0o622)

    assert refusal(path).endswith(f"chmod go-w '{path}'")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "it is a directory"),
        (_fifo, "it is a FIFO"),
        (_listener, "it is a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda _: None, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "one"
    make(path)

    assert words in refusal(path)
    assert exposure_of(str(tmp_path / "absent")) is None


def test_a_huge_file_is_refused_without_being_read(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)

    assert f"larger than {MAX_BYTES} bytes" in refusal(path)


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    assert "not the name of a file" in refusal(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbfsecret", "byte order mark"),
        ("secret".encode("utf-16"), "it is UTF-16"),
        (b"\x80\x81\x82", "it is not UTF-8"),
        (b"one\nse\0cret", "line 2 has a NUL byte"),
        (b"one\ntwo\nse\x1bcret", "line 3 has a control character"),
        ("one\ntw\x9bo".encode(), "line 2 has a control character"),
        (b"one\rtwo", "line 1 has a control character"),
    ],
)
def test_what_an_editor_does_not_show_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(FileRefused, match=words) as caught:
        text_of(content)
    assert "cret" not in str(caught.value)


def test_a_word_with_an_invisible_character_is_refused() -> None:
    with pytest.raises(FileRefused, match="not printable"):
        words_of("sec\u200bret".encode())


def test_lines_may_end_as_on_windows() -> None:
    assert words_of(b"one\r\ntwo\r\n\r\n") == ["one", "two"]
    assert words_of(b"") == []
