from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemosyned.security.file_reloader import FileReloader

SLOW_S = 0.3


async def test_a_file_system_that_is_slow_delays_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)  # which is warned of, after one more look at it
    reloader = FileReloader("test", [str(path)], lambda: slowly(path.read_text), secret_paths=[str(path)])
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **named: slowly(lambda: stat(*args, **named)))
    path.write_text("new one")
    lags_s = []

    look = asyncio.create_task(reloader.look())
    while not look.done():
        begun_s = time.monotonic()
        await asyncio.sleep(0.01)
        lags_s.append(time.monotonic() - begun_s)

    assert reloader.content == "new one"
    assert max(lags_s) < SLOW_S


def slowly(work: Callable[[], Any]) -> Any:  # noqa: ANN401  # of any kind
    time.sleep(SLOW_S)
    return work()
