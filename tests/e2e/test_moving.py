"""`mnemosyned export` and `import`: sessions move between storages, and no user is logged out."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import asyncpg
import pytest
from environments import environment, run_outside
from mnemosynerpc.session_pb2 import (
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from processes import Daemon, mnemosyned
from redis_clusters import RedisCluster
from redis_servers import RedisServer, needs_redis, redis_server
from secrecy import CANARY

from mnemosyned.sessions import bag, model
from mnemosyned.sessions.export_file import Header, Writer

pytestmark = needs_redis

COMMAND: Final = (sys.executable, "-m", "mnemosyned")
NEW: Final = StartRequest(
    session=Session(subject_id="user:1", subject_client="web", refresh_token="r", bag={"k": CANARY})
)
_LEGACY: Final = """
import sys
import grpc
from mnemosynerpc import session_pb2 as pb, session_pb2_grpc

address, token = sys.argv[1:]
stub = session_pb2_grpc.SessionManagerStub(grpc.insecure_channel(address))
if token:
    session = stub.Get(pb.GetRequest(access_token=token)).session
else:
    session = pb.Session(subject_id="user:1", subject_client="web", refresh_token="r", bag={"k": "v"})
    session = stub.Start(pb.StartRequest(session=session)).session
fields = session.subject_id, session.subject_client, session.refresh_token, dict(session.bag)
print(session.access_token, *fields)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as found:
        yield found


@pytest.fixture
def redis_flags(server: RedisServer) -> list[str]:
    return ["-storage=redis", f"-redis.address={server.url}"]


@pytest.fixture
def postgres_flags(postgres_dsn: str) -> list[str]:
    return ["-storage=postgres", f"-postgres.address={postgres_dsn}"]


@pytest.fixture
def key_flags(tmp_path: Path) -> list[str]:
    key = tmp_path / "token.key"
    key.write_text(f"{CANARY}-the-key-of-the-tokens-that-move\n")
    key.chmod(0o600)
    return ["-token.protection=hmac", f"-token.key.file={key}"]


def start(flags: list[str], count: int = 3) -> list[str]:
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        tokens = [stub.Start(NEW).session.access_token for _ in range(count)]
        assert daemon.stop() == 0
    return tokens


def get_all(flags: list[str], tokens: list[str]) -> None:
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        for token in tokens:
            session = stub.Get(GetRequest(access_token=token)).session
            assert (session.subject_id, session.refresh_token, dict(session.bag)) == (
                "user:1",
                "r",
                {"k": CANARY},
            )
        assert daemon.stop() == 0


def export(flags: list[str], path: Path, *more: str) -> str:
    """Export into a file; return what the command tells."""
    code, out, err = mnemosyned("export", *flags, f"-output={path}", *more)
    assert (code, out) == (0, ""), err
    return err


def legacy(python: str, daemon: Daemon, token: str = "") -> tuple[str, str]:
    done = run_outside(python, "-c", _LEGACY, daemon.serving().address, token)
    assert done.returncode == 0, done.stderr
    found, rest = done.stdout.split(" ", 1)
    return found, rest


@pytest.mark.timeout(180)
@pytest.mark.parametrize("direction", [pytest.param("to redis", marks=pytest.mark.slow), "to postgres"])
def test_a_session_of_the_old_client_is_read_with_its_token_after_the_move(
    direction: str, postgres_flags: list[str], redis_flags: list[str], tmp_path: Path
) -> None:
    python = environment("legacy-client", "mnemosyne-client==0.18.4", "protobuf==3.20.3", "grpcio")
    source, target = postgres_flags, redis_flags
    if direction == "to postgres":
        source, target = target, source
    with Daemon(*source) as daemon:
        token, content = legacy(python, daemon)
        assert daemon.stop() == 0
    assert "{'k': 'v'}" in content

    assert export(source, tmp_path / "f") == "1 sessions exported, 0 expired and 0 damaged left out\n"
    assert mnemosyned("import", *target, f"-input={tmp_path / 'f'}") == (
        0,
        "1 sessions imported, 0 there already\n",
        "",
    )

    with Daemon(*target) as daemon:
        assert legacy(python, daemon, token) == (token, content)


@pytest.mark.slow
async def test_a_session_of_the_go_daemon_keeps_its_bag(
    postgres_dsn: str, postgres_flags: list[str], redis_flags: list[str], tmp_path: Path
) -> None:
    start(postgres_flags, 0)
    gob = bytes.fromhex("127f0401010342616701ff8000010c010c000008ff800001016b0176")

    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "INSERT INTO mnemosyne.session (access_token, subject_id, bag, expire_at) "
        "VALUES ('go', 's', $1, now() + interval '1 h'), ('bad', 's', '\\x12', now() + interval '1 h'), "
        "('old', 's', '', now() - interval '1 s')",
        gob,
    )
    await connection.close()

    *damaged, total = export(postgres_flags, tmp_path / "f").splitlines()
    assert total == "1 sessions exported, 1 expired and 1 damaged left out"
    assert [line.split("  ")[1] for line in damaged] == ["a bag is cut short"]
    assert mnemosyned("import", *redis_flags, f"-input={tmp_path / 'f'}")[0] == 0

    with Daemon(*redis_flags) as daemon, daemon.serving().stub() as stub:
        assert dict(stub.Get(GetRequest(access_token="go")).session.bag) == {"k": "v"}
        answer = stub.SetValue(SetValueRequest(access_token="go", key="a", value="b"))
        assert dict(answer.bag) == {"k": "v", "a": "b"}


@pytest.mark.slow
def test_hashed_tokens_move_with_their_key_alone(
    postgres_flags: list[str], redis_flags: list[str], key_flags: list[str], tmp_path: Path
) -> None:
    tokens = start([*postgres_flags, *key_flags])
    path = tmp_path / "f"
    export(postgres_flags, path)
    assert not [token for token in tokens if token in path.read_text()]
    (key_id,) = json.loads(path.read_text().splitlines()[0])["header"]["hmac_key_ids"]

    code, out, err = mnemosyned("import", *redis_flags, f"-input={path}")
    assert (code, out) == (1, "")
    assert err == (
        "mnemosyned: the file has tokens that are hashed with another HMAC key: "
        f"-token.key.file must have the keys {key_id}\n"
    )
    assert mnemosyned("import", *redis_flags, *key_flags, f"-input={path}")[0] == 0

    get_all([*redis_flags, *key_flags], tokens)


def test_plain_tokens_are_hashed_by_an_import_into_a_storage_that_hashes(
    postgres_flags: list[str], redis_flags: list[str], key_flags: list[str], tmp_path: Path
) -> None:
    tokens = start(redis_flags)
    export(redis_flags, tmp_path / "f")
    assert mnemosyned("import", *postgres_flags, *key_flags, f"-input={tmp_path / 'f'}")[0] == 0

    export(postgres_flags, tmp_path / "g")
    assert not [token for token in tokens if token in (tmp_path / "g").read_text()]
    get_all([*postgres_flags, *key_flags], tokens)


@pytest.mark.parametrize("protection", [pytest.param("none", marks=pytest.mark.slow), "hmac"])
def test_sessions_move_from_a_cluster_through_postgres_to_mongodb_unchanged(
    *,
    redis_cluster: RedisCluster,
    postgres_flags: list[str],
    mongodb_url: str,
    key_flags: list[str],
    tmp_path: Path,
    protection: str,
) -> None:
    name = f"moving-{secrets.token_hex(4)}"
    more = key_flags if protection == "hmac" else []
    path = [
        ["-storage=redis", f"-redis.address={redis_cluster.url}", f"-redis.prefix={name}:", *more],
        [*postgres_flags, *more],
        ["-storage=mongodb", f"-mongodb.address={mongodb_url}", f"-mongodb.collection={name}", *more],
    ]
    tokens = start(path[0])
    exports = []
    for at, flags in enumerate(path):
        file = tmp_path / str(at)
        export(flags, file)
        exports.append(file.read_text().splitlines()[1:-1])
        for target in path[at + 1 : at + 2]:
            assert mnemosyned("import", *target, f"-input={file}")[:2] == (
                0,
                "3 sessions imported, 0 there already\n",
            )

    assert len(exports[0]) == 3
    assert exports[0] == exports[1] == exports[2]
    get_all(path[-1], tokens)


@pytest.mark.slow
def test_export_and_import_may_be_piped(postgres_flags: list[str], redis_flags: list[str]) -> None:
    tokens = start(postgres_flags)

    exporting = subprocess.Popen([*COMMAND, "export", *postgres_flags], stdout=subprocess.PIPE)
    done = subprocess.run(
        [*COMMAND, "import", *redis_flags],
        stdin=exporting.stdout,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert exporting.stdout is not None
    exporting.stdout.close()

    assert (exporting.wait(30), done.returncode) == (0, 0)
    assert (done.stdout, done.stderr) == ("3 sessions imported, 0 there already\n", "")
    get_all(redis_flags, tokens)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of three sessions."""
    return many_sessions(tmp_path / "three", 3, bag_bytes=10)


@pytest.fixture
def exported(redis_flags: list[str], tmp_path: Path) -> Path:
    """A file of three sessions that are in Redis."""
    start(redis_flags)
    export(redis_flags, tmp_path / "f")
    return tmp_path / "f"


def test_a_file_is_for_its_user_alone_and_never_replaced_unasked(
    exported: Path, redis_flags: list[str]
) -> None:
    before = exported.read_bytes()
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600

    assert mnemosyned("export", *redis_flags, f"-output={exported}") == (
        1,
        "",
        f"mnemosyned: {exported} exists already\n",
    )
    assert exported.read_bytes() == before
    export(redis_flags, exported, "-overwrite")

    assert exported.read_bytes() != before
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600


SPOILT: Final[dict[str, Callable[[list[str]], list[str]]]] = {
    "the file is cut off after line 4: its last line is missing": lambda lines: lines[:-1],
    "line 3: the file is cut off here": lambda lines: [*lines[:2], lines[2][:40]],
    "the file was changed or is damaged: its checksum is another one": lambda lines: [lines[0], *lines[2:]],
    "its checksum is another one": lambda lines: [
        lines[0],
        lines[1].replace("user:0", "user:9"),
        *lines[2:],
    ],
    "line 4: the session has a": lambda lines: [
        *lines[:3],
        lines[3].replace("expire_at", "expires"),
        lines[4],
    ],
    "the file has format 9": lambda lines: [lines[0].replace('"format":1', '"format":9'), *lines[1:]],
    "line 1: it is no file of mnemosyned export": lambda _: ["hello\n"],
    "the file is cut off after line 0": lambda _: [],
}


@pytest.mark.parametrize("way", ["file", pytest.param("pipe", marks=pytest.mark.slow)])
def test_a_spoilt_file_changes_nothing(file: Path, postgres_flags: list[str], way: str) -> None:
    lines = file.read_text().splitlines(keepends=True)
    for complaint, spoil in SPOILT.items():
        file.write_text("".join(spoil(lines)))

        if way == "file":
            code, out, err = mnemosyned("import", *postgres_flags, f"-input={file}")
        else:
            code, out, err = mnemosyned("import", *postgres_flags, stdin=file.read_text())

        assert (code, out) == (1, "")
        assert err.startswith("mnemosyned: ")
        assert complaint in err
        assert err.count("\n") == 1
    # Of all of them: nothing removes what one has put there.
    assert mnemosyned("check", *postgres_flags)[1] == "0 sessions checked, 0 damaged\n"


def test_a_full_disk_is_told_in_one_line(redis_flags: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "export", *redis_flags], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "mnemosyned: standard output: No space left on device"
    assert "Traceback" not in done.stderr


def limited(*arguments: str, stdin: str = "", **environ: str) -> tuple[int, str]:
    """Run a command that may write files of 512 bytes; return its exit code and complaints."""
    command = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *COMMAND, *arguments]
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | environ,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_file_that_grows_too_large_is_told_in_one_line_and_removed(
    redis_flags: list[str], exported: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "f"
    path.parent.mkdir()

    code, err = limited("export", *redis_flags, f"-output={path}")

    assert (code, err.splitlines()[-1]) == (1, f"mnemosyned: {path}: File too large")
    assert "Traceback" not in err
    assert list(path.parent.iterdir()) == []
    assert limited("import", *redis_flags, stdin=exported.read_text(), TMPDIR=str(path.parent)) == (
        1,
        "mnemosyned: the copy of the input in the directory TMPDIR: File too large\n",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (
            ["export", "-storage=memory"],
            2,
            "export needs a storage that keeps sessions, and -storage=memory does not",
        ),
        (
            ["import", "-storage=memory"],
            2,
            "import needs a storage that keeps sessions, and -storage=memory does not",
        ),
        (["export", "-outptu=x"], 2, "flag -outptu is not known; did you mean -output?"),
        (["import", "-existing=all"], 2, "flag -existing: 'all' is not one of refuse, skip, replace"),
        (["export", "-output=/missing/f"], 1, "/missing/f.partial: No such file or directory"),
        (["export", "-output=/dev/full"], 1, "/dev/full is not a regular file"),
        (["import", "-input=/missing"], 1, "/missing: No such file or directory"),
        (["import", "-input=/"], 1, "/: Is a directory"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments: list[str], code: int, complaint: str) -> None:
    assert mnemosyned(*arguments) == (code, "", f"mnemosyned: {complaint}\n")


@pytest.mark.parametrize("command", ["export", "import"])
def test_the_commands_explain_themselves(command: str) -> None:
    code, out, err = mnemosyned(command, "-help")

    assert (code, err) == (0, "")
    assert out.startswith(f"usage: mnemosyned {command}")


@pytest.mark.slow
def test_other_sessions_are_left_until_they_may_be_replaced(exported: Path, redis_flags: list[str]) -> None:
    (token, *_) = [
        json.loads(line)["session"]["access_token"] for line in exported.read_text().splitlines()[1:-1]
    ]
    with Daemon(*redis_flags) as daemon, daemon.serving().stub() as stub:
        stub.SetValue(SetValueRequest(access_token=token, key="k", value="later"))
        other = stub.Start(NEW).session.access_token
        assert daemon.stop() == 0

    code, out, err = mnemosyned("import", *redis_flags, f"-input={exported}")
    assert (code, out) == (1, "")
    assert "other sessions with the tokens of 1 of the 3 in the file" in err
    assert mnemosyned("import", *redis_flags, f"-input={exported}", "-existing=skip")[:2] == (
        1,
        "0 sessions imported, 2 there already, 1 different and left\n",
    )
    assert mnemosyned("import", *redis_flags, f"-input={exported}", "-existing=replace", "-prune")[:2] == (
        0,
        "0 sessions imported, 2 there already, 1 replaced, 1 pruned\n",
    )
    with Daemon(*redis_flags) as daemon, daemon.serving().stub() as stub:
        assert dict(stub.Get(GetRequest(access_token=token)).session.bag) == {"k": CANARY}
        assert not stub.Exists(ExistsRequest(access_token=other)).value


@pytest.mark.slow
def test_sessions_of_running_daemons_are_added_to_and_never_changed(
    file: Path, postgres_flags: list[str]
) -> None:
    tokens = [json.loads(line)["session"]["access_token"] for line in file.read_text().splitlines()[1:-1]]
    with Daemon(*postgres_flags, "-cache.ttl=10m") as daemon, daemon.leased().stub() as stub:
        # The node remembers that there are no such sessions.
        for _ in range(2):
            assert not any(stub.Exists(ExistsRequest(access_token=token)).value for token in tokens)
        for flag in ("-existing=replace", "-prune"):
            code, out, err = mnemosyned("import", *postgres_flags, f"-input={file}", flag)
            assert (code, out) == (1, "")
            assert "daemons run on the storage (alone-" in err
        assert not any(stub.Exists(ExistsRequest(access_token=token)).value for token in tokens)

        assert mnemosyned("import", *postgres_flags, f"-input={file}")[0] == 0

        assert all(stub.Exists(ExistsRequest(access_token=token)).value for token in tokens)
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_import_that_is_interrupted_goes_on_the_next_time(
    server: RedisServer, redis_flags: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    path = many_sessions(tmp_path / "many", 20_000, bag_bytes=10)
    importing = subprocess.Popen(
        [*COMMAND, "import", *redis_flags, f"-input={path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 60
    while server.command("EXISTS", "mnemosyne:n") == b":0\r\n":
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    importing.send_signal(number)
    out, err = importing.communicate(timeout=60)

    assert (importing.returncode, err) == (
        130,
        "mnemosyned: interrupted: the same command goes on with the rest\n",
    )
    done = int(out.split()[0])
    assert 0 < done < 20_000
    assert int(server.command("ZCARD", "mnemosyne:n")[1:]) == done
    assert mnemosyned("import", *redis_flags, f"-input={path}")[:2] == (
        0,
        f"{20_000 - done} sessions imported, {done} there already\n",
    )


@pytest.mark.slow
def test_an_export_that_is_interrupted_leaves_nothing(redis_flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out" / "f"
    path.parent.mkdir()
    many = many_sessions(tmp_path / "many", 30_000, bag_bytes=10)
    assert mnemosyned("import", *redis_flags, f"-input={many}")[0] == 0
    # A person, a service manager, a terminal that is closed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        exporting = subprocess.Popen(
            [*COMMAND, "export", *redis_flags, f"-output={path}"], stderr=subprocess.PIPE, text=True
        )
        deadline_s = time.monotonic() + 60
        while not (path.parent / "f.partial").exists() or not (path.parent / "f.partial").stat().st_size:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        exporting.send_signal(number)
        _, err = exporting.communicate(timeout=60)

        assert (exporting.returncode, err) == (130, "")
        assert list(path.parent.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sessions(redis_flags: list[str], tmp_path: Path) -> None:
    path = many_sessions(tmp_path / "many", 4_000, bag_bytes=60_000)
    assert path.stat().st_size > 200 * 2**20

    peaks = [
        peak_bytes("import", *redis_flags, f"-input={path}"),
        peak_bytes("export", *redis_flags, f"-output={tmp_path / 'out'}"),
    ]

    assert max(peaks) < 150 * 2**20
    assert (tmp_path / "out").stat().st_size == pytest.approx(path.stat().st_size, abs=1000)


@pytest.mark.slow
def test_a_terminal_shows_how_far_it_is(redis_flags: list[str], exported: Path, tmp_path: Path) -> None:
    for command in ("export", "import"):
        ours, theirs = pty.openpty()
        where = f"-output={tmp_path / 'new'}" if command == "export" else f"-input={exported}"
        done = subprocess.run(
            [*COMMAND, command, *redis_flags, where], stderr=theirs, stdout=theirs, check=False
        )
        os.close(theirs)
        shown = os.read(ours, 10_000).decode()
        os.close(ours)

        assert done.returncode == 0
        assert ("3 sessions exported" if command == "export" else "0 of 3 sessions imported") in shown
        assert shown.count("\r") > 1


def test_no_tokens_are_shown_on_a_terminal_unasked(redis_flags: list[str]) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*COMMAND, "export", *redis_flags], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    os.close(ours)

    assert (done.returncode, done.stderr) == (
        2,
        "mnemosyned: the file has tokens: name it with -output=FILE, or -output=- to show them\n",
    )


def many_sessions(path: Path, count: int, *, bag_bytes: int) -> Path:
    writer = Writer()
    stored = bag.encode({"k": CANARY + "x" * bag_bytes})
    expires_at_us = int((time.time() + 3600) * 1e6)
    header = Header(engine="test", version="1", exported_at_us=expires_at_us, hmac_key_ids=())
    with path.open("w") as file:
        file.write(writer.header(header))
        for number in range(count):
            file.write(
                writer.session(
                    model.Session(
                        access_token=f"{number:0128}",
                        subject_id=f"user:{number}",
                        subject_client="",
                        refresh_token="",
                        bag=stored,
                        expires_at_us=expires_at_us,
                    )
                )
            )
        file.write(writer.end(expired=0, damaged=0))
    return path


def peak_bytes(*arguments: str) -> int:
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    # Not from wait4: that counts the memory of this process too, since a child begins as a copy of it.
    while process.poll() is None:
        peak = max(peak, _high_water_bytes(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    assert peak > 0
    return peak


def _high_water_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    # A process that has just ended has none.
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
