"""Where tests write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import scratch


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)


def test_a_directory_with_room_is_used(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    scratch.choose(environ, tmp_path, room_bytes=1)

    assert environ == {"TMPDIR": str(tmp_path)}


def test_one_without_room_is_not(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    scratch.choose(environ, tmp_path, room_bytes=1 << 60)

    assert not environ


def test_one_that_is_not_there_is_not(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    scratch.choose(environ, tmp_path / "absent", room_bytes=1)

    assert not environ


def test_a_directory_that_the_user_chose_stays(tmp_path: Path) -> None:
    environ = {"TMPDIR": "/elsewhere"}
    scratch.choose(environ, tmp_path, room_bytes=1)

    assert environ == {"TMPDIR": "/elsewhere"}
