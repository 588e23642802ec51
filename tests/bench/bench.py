"""Compare the daemon with a bare server on this machine: `make bench`.

Ratios, because the machine is shared: the two are measured in turn, several times. Servers are
pinned to one core and the load generator to another; the CPU is the server process's own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest

# First: tests/ has a folder of this name.
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Daemon

SERVER_CORE, LOAD_CORE = 0, 1
# The daemon asks a client for a new connection after 3,400 calls (http2/core.py), and h2load opens none.
CONNECTIONS, CALLS_A_CONNECTION = 4, 3000
SERVICE = "mnemosynerpc.SessionManager"
NEW = Session(
    access_token="a" * 128,
    subject_id="user:1",
    subject_client="web",
    bag={"name": "Ada Lovelace", "theme": "dark", "language": "en"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=60_000, help="calls a round")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("make bench needs h2load: apt-get install nghttp2-client")
    with tempfile.TemporaryDirectory() as directory:
        compare_cached_gets(Path(directory), options.rounds, options.calls)
        measure_storage(Path(directory), options.calls)


def compare_cached_gets(directory: Path, rounds: int, calls: int) -> None:
    size = len(StartRequest(session=NEW).SerializeToString()) + 14  # and the expiry
    port = free_port()
    echo = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("echo.py")), str(port), str(size)],
        stderr=subprocess.DEVNULL,
    )
    body = request_body(directory, GetRequest(access_token=NEW.access_token).SerializeToString())
    try:
        with (
            Daemon("-storage=memory") as daemon,
            Daemon("-storage=memory", "-grpc.engine=grpcio") as slower,
        ):
            for one in (daemon, slower):
                with one.serving().stub() as stub:
                    stub.Start(StartRequest(session=NEW))
            addresses = {
                "bare echo": (f"127.0.0.1:{port}", echo.pid),
                "cached Get": (daemon.address, daemon.process.pid),
                "the same, grpcio": (slower.address, slower.process.pid),
            }
            for _, pid in addresses.values():
                pin(pid, SERVER_CORE)
            costs: dict[str, list[float]] = {name: [] for name in addresses}
            for _ in range(rounds):
                for name, (address, pid) in addresses.items():
                    count = calls // (4 if name.endswith("grpcio") else 1)
                    costs[name].append(
                        cpu_us(pid, lambda a=address, n=count: load(a, "Get", body, n)) / count
                    )
    finally:
        echo.kill()
        echo.wait()
    print(f"\ncached Get, {size}-byte response, server on one core, {rounds} rounds of {calls} calls")
    print(f"  {'':18} {'CPU us a call':>14} {'ratio to the echo of its round':>34}")
    for name, values in costs.items():
        ratios = sorted(value / base for value, base in zip(values, costs["bare echo"], strict=True))
        spread = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {name:18} {statistics.median(values):14.1f} {spread:>34}")


def measure_storage(directory: Path, calls: int) -> None:
    start = request_body(directory, StartRequest(session=Session(subject_id="user:1")).SerializeToString())
    print("\nagainst PostgreSQL with fsync on, 64 calls at a time")
    with EmbeddedPostgres.start(directory / "postgres") as server:
        flags = [f"-postgres.address={server.dsn}"]
        with Daemon(*flags) as daemon:
            daemon.serving()
            report("Starts", daemon, "start", lambda: load(daemon.address, "Start", start, calls), calls)
        with Daemon(*flags, "-cache.ttl=0") as daemon, daemon.serving().stub() as stub:
            stub.Start(StartRequest(session=NEW))
            get = request_body(directory, GetRequest(access_token=NEW.access_token).SerializeToString())
            report("uncached Gets", daemon, "load", lambda: load(daemon.address, "Get", get, calls), calls)


def report(name: str, daemon: Daemon, query: str, run: Callable[[], None], calls: int) -> None:
    before, begun_s = statements(daemon, query), time.perf_counter()
    run()
    took_s, sent = time.perf_counter() - begun_s, statements(daemon, query) - before
    print(f"  {name:14} {calls / took_s:8.0f} a second {calls / sent:8.1f} calls a statement")


def statements(daemon: Daemon, query: str) -> float:
    _, page = daemon.http("/metrics")
    found = re.search(rf'queries_total{{query="{query}"}} (\S+)', page)
    return float(found[1]) if found else 0.0


def request_body(directory: Path, message: bytes) -> Path:
    path = directory / f"{len(message)}.body"
    path.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return path


def portions(calls: int) -> list[int]:
    """Return how many calls each run of h2load makes."""
    most = CONNECTIONS * CALLS_A_CONNECTION
    return [min(calls - done, most) for done in range(0, calls, most)]


def load(address: str, method: str, body: Path, calls: int) -> None:
    for portion in portions(calls):
        load_once(address, method, body, portion)


def load_once(address: str, method: str, body: Path, calls: int) -> None:
    command = [
        "taskset",
        "-c",
        str(LOAD_CORE),
        "h2load",
        "-c",
        str(CONNECTIONS),
        "-m",
        "16",
        "-n",
        str(calls),
        "-d",
        str(body),
    ]
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    url = f"http://{address}/{SERVICE}/{method}"
    out = subprocess.run([*command, *headers, url], check=True, capture_output=True, text=True).stdout
    assert f"{calls} succeeded, 0 failed" in out, out


def cpu_us(pid: int, run: Callable[[], None]) -> float:
    before = cpu_ticks(pid)
    run()
    return (cpu_ticks(pid) - before) / os.sysconf("SC_CLK_TCK") * 1e6


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def pin(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
