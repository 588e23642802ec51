from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemosyned.transport.engine import ListenFailed
from mnemosyned.workers.sockets import Sockets


@pytest.fixture
def place() -> Iterator[Path]:
    # With a short name, which `tmp_path` has not everywhere.
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory).resolve()


async def test_everything_is_gone_after_the_end(place: Path) -> None:
    path = place / "clients"
    sockets = await Sockets.open(f"unix:{path}", 0, 2, {"XDG_RUNTIME_DIR": str(place)})
    names = {one.name for one in place.iterdir()}  # noqa: ASYNC240  # a test's own directory

    sockets.close()

    assert "clients" in names
    assert len(names) == 2
    assert list(place.iterdir()) == []  # noqa: ASYNC240  # see above


async def test_an_address_in_use_is_named_and_leaves_nothing(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenFailed, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await Sockets.open("127.0.0.1", port, 2, {"TMPDIR": str(place)})

    assert list(place.iterdir()) == []  # noqa: ASYNC240  # see above


@pytest.mark.parametrize("mode", [0o777, 0o722])
async def test_a_place_where_another_user_could_replace_the_directory_is_not_used(
    place: Path, mode: int
) -> None:
    os.chmod(place, mode)  # noqa: PTH101  # a test's own directory

    sockets = await Sockets.open("127.0.0.1", 0, 2, {"XDG_RUNTIME_DIR": str(place)})

    assert not sockets.directory.startswith(str(place))
    assert sockets.port
    sockets.close()


async def test_a_name_too_long_for_a_socket_is_passed_over(place: Path) -> None:
    longer = place / ("x" * 90)
    longer.mkdir()

    sockets = await Sockets.open("127.0.0.1", 0, 2, {"TMPDIR": str(longer)})

    assert not sockets.directory.startswith(str(longer))
    sockets.close()
