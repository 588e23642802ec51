"""One process beside one daemon with workers: calls a second, and CPU a call: `make workers`.

The load, h2load, is on the same processors: on two of them, two workers cannot do twice as much. So CPU a
call is what to look at. If it is the same with workers, they do as many times more as there are processors to
spare.

    Health.Check       needs no token: what sharing the port costs
    Get, one token     belongs to one worker: every other call is forwarded, or answered from a mirror
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest

# First: tests/ has a folder of this name.
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Daemon

CONNECTIONS = 16
# The daemon asks a client for a new connection after 3,400 calls, and h2load opens none.
CALLS = CONNECTIONS * 1200
WARM_UP_S = 4.0
CALLED = {
    "Health.Check": "grpc.health.v1.Health/Check",
    "Get, one token": "mnemosynerpc.SessionManager/Get",
}
NEW = StartRequest(session=Session(subject_id="s", bag={"a": "b", "c": "d", "e": "f"}))


def processes_of(daemon: Daemon) -> list[int]:
    """The supervisor and its workers, or the one process."""
    found = [daemon.process.pid]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == daemon.process.pid and b"mnemosyned" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def cpu_s(pids: list[int]) -> float:
    """What these processes have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def run(daemon: Daemon, path: str, body: bytes) -> tuple[float, float]:
    """Return calls a second, and microseconds of CPU a call."""
    pids = processes_of(daemon)
    with tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("!BI", 0, len(body)) + body)
        file.flush()
        before = cpu_s(pids)
        options = ["-c", str(CONNECTIONS), "-m", "8", "-n", str(CALLS), "-d", file.name]
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        command = ["h2load", *options, *headers, f"http://{daemon.address}/{path}"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{CALLS} succeeded" in output, output
    found = re.search(r"([\d.]+) req/s", output)
    assert found is not None
    return float(found[1]), (cpu_s(pids) - before) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("make workers needs h2load: apt-get install nghttp2-client")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedPostgres.start(directory / "postgres"))
        daemons = {}
        for count in (1, arguments.workers):
            flags = (f"-workers={count}", f"-postgres.address={server.dsn}", f"-postgres.schema=of_{count}")
            daemons[count] = stack.enter_context(Daemon(*flags, "-ttl=48h")).serving()
        time.sleep(WARM_UP_S)
        print("call             workers  calls/s   CPU a call")
        for name, path in CALLED.items():
            compare(name, path, daemons, arguments.rounds)


def compare(name: str, path: str, daemons: dict[int, Daemon], rounds: int) -> None:
    """Print the medians of rounds in which each daemon has its turn."""
    bodies = dict.fromkeys(daemons, b"")
    if path.endswith("Get"):
        bodies = {count: request_of(daemon) for count, daemon in daemons.items()}
    results: dict[int, list[tuple[float, float]]] = {count: [] for count in daemons}
    for number in range(rounds + 1):
        for count, daemon in daemons.items():
            result = run(daemon, path, bodies[count])
            if number:  # the first round warms up
                results[count].append(result)
    for count, found in results.items():
        rate, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:16} {count:7} {rate:8.0f} {cpu:9.1f} µs")


def request_of(daemon: Daemon) -> bytes:
    """A request for a session that there is."""
    with daemon.stub() as stub:
        token = stub.Start(NEW, timeout=5).session.access_token
    return GetRequest(access_token=token).SerializeToString()


if __name__ == "__main__":
    main()
