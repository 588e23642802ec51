"""Standard streams as people have them: stuck, full, closed. Neither calls nor the stop depend on them."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from clusters import free_ports
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon
from serving import ENGINES

INVALID_ARGUMENT, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
MEMORY = "-storage=memory"
NEW = StartRequest(session=Session(subject_id="s"))
MNEMOSYNED = f"{sys.executable} -m mnemosyned"


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    stub: SessionManagerStub
    admin: str

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=5) as page:  # noqa: S310  # http
            lines = page.read().decode().splitlines()
        (line,) = [line for line in lines if line.startswith(name + " ")]
        return float(line.split()[1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@contextmanager
def started(
    redirections: str, *flags: str, stderr: int | None = None, before: str = ":"
) -> Iterator[Started]:
    """A daemon whose shell has these redirections, after the shell has run `before`."""
    port = free_ports(2)[0]
    command = " ".join([f"{before}; exec {MNEMOSYNED} {MEMORY} -port={port}", *flags, redirections])
    process = subprocess.Popen(["/bin/sh", "-c", command], stderr=stderr)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=20)
            yield Started(process, SessionManagerStub(channel), f"http://127.0.0.1:{port + 1}")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_log_that_nothing_reads_delays_neither_calls_nor_the_stop(engine: str) -> None:
    reader, writer = os.pipe()
    with started("", f"-grpc.engine={engine}", "-log.level=debug", stderr=writer) as daemon:
        token = daemon.stub.Start(NEW, timeout=5).session.access_token
        for _ in range(1000):
            daemon.stub.Get(GetRequest(access_token=token), timeout=5)

        assert daemon.metric("mnemosyned_log_lines_dropped_total") == 0
        assert daemon.stop() == 0
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        # 64 KiB, which is all that the pipe could take.
        lines = stream.read().splitlines()
    assert len(lines) > 100
    assert json.loads(lines[0])["msg"] == "configuration"


@pytest.mark.parametrize("redirections", [
    ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>/dev/full", ">/dev/full",
])  # fmt: skip
@pytest.mark.parametrize("environment", ["production", "development"])
def test_a_stream_that_takes_nothing_does_not_end_the_daemon(redirections: str, environment: str) -> None:
    with started(redirections, f"-log.environment={environment}") as daemon:
        token = daemon.stub.Start(NEW, timeout=5).session.access_token
        assert daemon.stub.Get(GetRequest(access_token=token), timeout=5).session.subject_id == "s"
        assert (daemon.metric("mnemosyned_log_lines_dropped_total") > 0) == ("2>/dev/full" in redirections)

        assert daemon.stop() == 0


def test_a_pipe_that_breaks_loses_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    with started("", "-log.level=debug", stderr=writer) as daemon:
        os.close(writer)
        os.close(reader)
        token = daemon.stub.Start(NEW, timeout=5).session.access_token
        for _ in range(10):
            daemon.stub.Get(GetRequest(access_token=token), timeout=5)

        assert daemon.metric("mnemosyned_log_lines_dropped_total") > 10
        assert daemon.stop() == 0


COMMANDS = ["-help", "-version", "-storage=memory -check-config", "key", "completion bash", "cluster -help"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>&- >/dev/full"])
def test_a_command_that_cannot_print_its_result_fails_in_one_line(command: str, redirection: str) -> None:
    shell = f"{MNEMOSYNED} {command} {redirection}"
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 1
    if "2>&-" not in redirection:
        (line,) = done.stderr.splitlines()
        assert line.startswith("mnemosyned: standard output")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "<&-"])
def test_a_command_needs_its_standard_output_alone(redirection: str) -> None:
    shell = f"{MNEMOSYNED} -version {redirection}"
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=30, check=False)

    assert (done.returncode, done.stdout[:11]) == (0, "mnemosyned ")


@pytest.mark.parametrize("environment", ["production", "stackdriver"])
def test_the_reason_of_a_failed_start_is_the_last_json_line(tmp_path: Path, environment: str) -> None:
    (port,) = free_ports(1)
    taken = f"{MNEMOSYNED} {MEMORY} -host=unix:{tmp_path}/missing/socket -port={port}"
    done = subprocess.run(
        [*taken.split(), f"-log.environment={environment}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    last = json.loads(done.stderr.splitlines()[-1])

    assert done.returncode == 1
    assert last.get("msg", last.get("message")) == "start_failed"
    assert last.get("level", last.get("severity")) in {"error", "ERROR"}
    assert "cannot listen on unix:" in last["error"]
    assert len(done.stderr.splitlines()) == 1


def test_the_reason_of_a_failed_start_is_logged_whatever_the_level(tmp_path: Path) -> None:
    command = f"{MNEMOSYNED} {MEMORY} -host=unix:{tmp_path}/missing/socket -log.level=fatal"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30, check=False)

    (line,) = done.stderr.splitlines()
    assert (json.loads(line)["level"], json.loads(line)["msg"]) == ("error", "start_failed")


def test_the_log_for_people_ends_with_the_reason_of_a_failed_start_too(tmp_path: Path) -> None:
    command = f"{MNEMOSYNED} {MEMORY} -host=unix:{tmp_path}/missing/socket -log.environment=development"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "error" in last
    assert "cannot listen on unix:" in last


@pytest.fixture
def stuck() -> Iterator[int]:
    """A pipe that is full, and that nothing reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * size)
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("module", "command", "exit_code"), [
    ("mnemosyned", "-nonsense", 2),
    ("mnemosyned", "key nonsense", 2),
    ("mnemosyned", "cluster members -node 127.0.0.1:1", 1),
    ("mnemosyned", "check -storage=memory", 2),
    ("mnemosyned", "migrate -storage=memory", 2),
    ("mnemosyned.commands.healthcheck", "", 1),
])  # fmt: skip
def test_a_complaint_that_nothing_reads_holds_no_command(
    stuck: int, module: str, command: str, exit_code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *command.split()],
        stdout=subprocess.DEVNULL,
        stderr=stuck,
        env=os.environ | {"MNEMOSYNED_PORT": "1"},
        timeout=30,
        check=False,
    )

    assert done.returncode == exit_code


@pytest.mark.parametrize("flags", [("-grpc.engine=grpcio", "-grpc.debug"), ("-log.environment=development",)])
def test_a_pipe_that_is_stuck_from_the_start_holds_neither_start_nor_stop(
    stuck: int, flags: tuple[str, ...]
) -> None:
    with started("1>&2", *flags, stderr=stuck) as daemon:
        daemon.stub.Start(NEW, timeout=5)

        assert daemon.stop() == 0


def test_lines_of_grpcios_core_have_the_form_of_the_log() -> None:
    with Daemon(MEMORY, "-grpc.engine=grpcio", "-grpc.debug") as daemon:
        assert daemon.serving().stop() == 0

    lines = [json.loads(line) for line in daemon.lines]
    levels = {line["level"] for line in lines if line["logger"] == "mnemosyned.transport.native"}
    assert "warning" in levels


@pytest.mark.parametrize("engine", ENGINES)
def test_refused_calls_are_few_lines_and_all_are_counted(engine: str) -> None:
    count = 400
    with Daemon(MEMORY, f"-grpc.engine={engine}") as daemon:
        with daemon.serving().stub() as stub:
            calls = [stub.Get.future(GetRequest(access_token=token)) for token in ("", "0" * 128) * count]
            codes = Counter(call.code() for call in calls)
        assert daemon.stop() == 0

    assert codes == {INVALID_ARGUMENT: count, NOT_FOUND: count}
    lines = [json.loads(line) for line in daemon.lines if "rpc_failed" in line]
    # A token that has ended is no event.
    assert all(line.get("code", "INVALID_ARGUMENT") == "INVALID_ARGUMENT" for line in lines)
    written = [line for line in lines if line["msg"] == "rpc_failed"]
    assert len(written) < count
    assert len(written) + sum(line.get("left_out", 0) for line in lines) == count


def test_a_log_file_that_has_space_again_goes_on_and_says_what_it_lacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    # A limit of the file's size refuses lines as a full disk does, at once or in the middle of a line.
    with started(f"2>>{log}", "-log.level=debug", before="ulimit -f 8") as daemon:
        token = daemon.stub.Start(NEW, timeout=5).session.access_token
        while daemon.metric("mnemosyned_log_lines_dropped_total") < 10:
            daemon.stub.Get(GetRequest(access_token=token), timeout=5)
        os.truncate(log, 0)
        daemon.stub.Get(GetRequest(access_token=token), timeout=5)
        assert daemon.stop() == 0

    lines = [json.loads(line) for line in log.read_text().splitlines() if line]
    assert lines[0]["msg"] == "log_lines_dropped"
    assert lines[0]["lines"] >= 10
    assert lines[0]["reason"] == "File too large"
    assert lines[-1]["msg"] == "stopped"


def test_a_result_waits_for_a_slow_reader_of_a_non_blocking_pipe() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    process = subprocess.Popen([*MNEMOSYNED.split(), "-help"], stdout=writer)
    os.close(writer)
    select.select([reader], [], [], 30)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()

    assert process.wait(timeout=30) == 0
    assert len(text) > 2 * 4096
    assert text == subprocess.run([*MNEMOSYNED.split(), "-help"], capture_output=True, check=True).stdout


def test_a_terminal_that_lacks_a_character_gets_its_escape() -> None:
    command = [*MNEMOSYNED.split(), "cluster", "-help"]
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environ, timeout=30, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
