"""What an import reads is verified as a whole, from a file or a pipe, and read again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mnemosyned.commands.import_source import SourceFailed, opened
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.export_file import BadExport, Header, Summary, Writer
from mnemosyned.sessions.model import Session

HASH = "\0" + "0a" * 36


def session(key: str) -> Session:
    return Session(
        access_token=key,
        subject_id="s",
        subject_client="",
        refresh_token="",
        bag=b"",
        expires_at_us=1_800_000_000_000_000,
    )


SESSIONS = [session(HASH), session("a"), session("b")]


def text() -> str:
    writer = Writer()
    header = Header(engine="e", version="v", exported_at_us=0, hmac_key_ids=("0a0a0a0a",))
    return writer.header(header) + "".join(map(writer.session, SESSIONS)) + writer.end(expired=0, damaged=0)


@pytest.fixture(params=["file", "pipe"])
def lent(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Offer a text as a file or as a pipe; return its name."""

    def offer(content: str) -> str:
        path = tmp_path / "input"
        if request.param == "file":
            path.write_text(content)
            return str(path)
        os.mkfifo(path)

        def write() -> None:
            # A reader that has seen enough does not read the rest.
            with suppress(BrokenPipeError):
                path.write_text(content)

        writer = threading.Thread(target=write)
        writer.start()
        request.addfinalizer(writer.join)
        return str(path)

    return offer


def test_it_is_verified_once_and_read_as_often_as_needed(lent: Callable[[str], str]) -> None:
    with opened(lent(text()), BagLimits()) as source:
        contents = source.verify()

        assert contents.summary == Summary(sessions=3)
        assert contents.header.engine == "e"
        assert contents.key_ids == {"0a0a0a0a"}
        assert list(source.sessions()) == SESSIONS
        assert list(source.sessions()) == SESSIONS


def test_a_part_of_it_is_refused(lent: Callable[[str], str]) -> None:
    with opened(lent(text()[:-9]), BagLimits()) as source, pytest.raises(BadExport):
        source.verify()


def test_a_change_after_it_was_verified_is_met(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text(text())

    with opened(str(path), BagLimits()) as source:
        source.verify()
        path.write_text(text().replace('"subject_id":"s"', '"subject_id":"x"'))
        with pytest.raises(BadExport, match="checksum"):
            list(source.sessions())


def test_no_copy_of_a_pipe_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "copies"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text(),))
    writer.start()

    with opened(str(path), BagLimits()) as source:
        source.verify()
        assert list(directory.iterdir()) == []
    writer.join()


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SourceFailed, match=f"^{name}: "), opened(name, BagLimits()):
        raise AssertionError
