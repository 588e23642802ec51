"""A file with secrets is either complete or not there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemosyned.commands.new_file import FileFailed, new_file


@pytest.fixture(autouse=True)
def _generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_file_is_for_its_user_alone_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "f"

    with new_file(str(path), may_replace=False) as file:
        file.write("text\n")
        assert not path.exists()
        assert stat.S_IMODE((tmp_path / "f.partial").stat().st_mode) == 0o600

    assert path.read_text() == "text\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_what_failed_and_what_was_there_stays(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "there").write_text("before")

    def write(name: str, *, may_replace: bool) -> None:
        with new_file(str(tmp_path / name), may_replace=may_replace) as file:
            file.write("text")
            raise error

    for name, may_replace in (("f", False), ("there", True)):
        with pytest.raises(error):
            write(name, may_replace=may_replace)

    assert [one.name for one in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "before"


def test_nothing_is_left_of_what_was_discarded(tmp_path: Path) -> None:
    with new_file(str(tmp_path / "f"), may_replace=False) as file:
        file.write("text")
        file.discard()

    assert list(tmp_path.iterdir()) == []


def test_another_file_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("before")

    with pytest.raises(FileFailed, match="f exists already"), new_file(str(path), may_replace=False):
        raise AssertionError
    assert path.read_text() == "before"
    with new_file(str(path), may_replace=True) as file:
        file.write("after")

    assert path.read_text() == "after"


def test_a_file_that_others_made_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def write() -> None:
        with new_file(str(path), may_replace=False) as file:
            file.write("ours")
            path.write_text("theirs")

    with pytest.raises(FileFailed, match="File exists"):
        write()

    assert path.read_text() == "theirs"
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_two_exports_do_not_write_the_same_file(tmp_path: Path) -> None:
    with (
        new_file(str(tmp_path / "f"), may_replace=False) as file,
        pytest.raises(FileFailed, match="another export may be writing it"),
        new_file(str(tmp_path / "f"), may_replace=False),
    ):
        raise AssertionError(file)


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("before")
    (tmp_path / "f.partial").symlink_to(tmp_path / "other")
    (tmp_path / "g").symlink_to(tmp_path / "other")

    for name, may_replace in (("f", False), ("g", False), ("g", True)):
        with pytest.raises(FileFailed), new_file(str(tmp_path / name), may_replace=may_replace):
            raise AssertionError

    assert (tmp_path / "other").read_text() == "before"


@pytest.mark.parametrize("name", ["missing/f", "", "/dev/full", "."])
def test_what_cannot_be_a_file_is_told_in_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    for may_replace in (False, True):
        with pytest.raises(FileFailed) as caught, new_file(name, may_replace=may_replace):
            raise AssertionError
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
