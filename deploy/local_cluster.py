"""Three nodes and a PostgreSQL on this machine, for trying out.

`make cluster` runs them until Ctrl-C, or until the terminal is closed. `make node N=2` starts the second one
again after it has died. Both work in the directory of the embedded PostgreSQL:

    cluster.ports    the nodes' ports; locked by the process that runs the cluster
    cluster.secret   the nodes' secret; a cluster makes its own
    cluster.log      the nodes' log

CLUSTER_PORTS in the environment replaces the ports, as in `make cluster CLUSTER_PORTS=9080,9082,9084`.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn, TextIO

from mnemosyned.embedded.address import data_directory
from mnemosyned.embedded.programs import EmbeddedError
from mnemosyned.embedded.server import EmbeddedPostgres

_PORTS: Final = "8080,8082,8084"
_NODES: Final = 3
_LOOK_AGAIN_S: Final = 0.2
_WELCOME: Final = """
three nodes of one cluster; their log is {log}
{nodes}
  look at it     {bin}/mnemosyned cluster members -node {first}
  read from it   {bin}/python -m mnemosynerpc.reader {all}
  kill one       kill -9 its pid, and go on reading; start it again with make node N=1, 2 or 3
  let one leave  {bin}/mnemosyned cluster leave -node {second} -cluster.secret.file {secret}
  stop them all  Ctrl-C

"""
# As long as the default of -drain.timeout.
_STOPPING: Final = "stopping {}: they finish the calls in flight, for at most 10 s; Ctrl-C again kills them\n"


def main(arguments: list[str]) -> int:
    """Run the cluster; as `node NUMBER`, one node of a cluster that runs already."""
    try:
        directory = data_directory("embedded:", os.environ)
        return _run_node(directory, arguments[1:]) if arguments else _run_cluster(directory)
    except EmbeddedError as exc:
        return _complain(f"embedded PostgreSQL: {exc}")
    except KeyboardInterrupt:  # before there was a node
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    ports: Path
    secret: Path
    log: Path

    @classmethod
    def within(cls, directory: Path) -> _Files:
        ports, secret, log = (directory / f"cluster.{name}" for name in ("ports", "secret", "log"))
        return cls(ports=ports, secret=secret, log=log)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    number: int
    port: int
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return f"node {self.number} ({_address(self.port)}, pid {self.process.pid})"


def _run_cluster(directory: Path) -> int:
    """Run until Ctrl-C, or until no node is left. When a node dies, only the other nodes react."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _hang_up)
    numbers = os.environ.get("CLUSTER_PORTS", _PORTS).split(",")
    if len(numbers) != _NODES or not all(number.isdecimal() for number in numbers):
        return _complain("CLUSTER_PORTS must be three numbers, as in 8080,8082,8084")
    ports, files = [int(number) for number in numbers], _Files.within(directory)
    with EmbeddedPostgres.start(directory) as server, files.ports.open("a") as claim:
        if not _has_claimed(claim, ports):
            return _complain("a cluster runs already; `make node N=2` starts a node of it again")
        files.secret.touch(mode=0o600)
        files.secret.write_text(secrets.token_hex(32) + "\n")
        nodes: list[_Node] = []
        try:
            with files.log.open("ab") as log:
                nodes += _started(ports, _environ(server.dsn, files, ports), log)
            _welcome(nodes, files)
            _watch(nodes, files)
        except KeyboardInterrupt:
            return 0
        finally:
            _stop([node for node in nodes if node.process.poll() is None])
            _tell_of_others(nodes)
    return _complain("no node is left")


def _hang_up(_number: int, _frame: object) -> NoReturn:
    # The terminal was closed. The kernel and the shell may both say so, and once is as Ctrl-C.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


def _has_claimed(file: TextIO, ports: Iterable[int]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    file.truncate(0)
    file.write(_joined(ports))
    file.flush()
    return True


def _started(ports: Iterable[int], environ: dict[str, str], log: BinaryIO) -> Iterable[_Node]:
    for number, port in enumerate(ports, start=1):
        process = subprocess.Popen(
            _command(port),
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # In a session of its own: Ctrl-C is this process's to pass on.
            start_new_session=True,
        )
        yield _Node(number=number, port=port, process=process)


def _welcome(nodes: list[_Node], files: _Files) -> None:
    addresses = [_address(node.port) for node in nodes]
    lines = [f"  {address}  pid {node.process.pid}" for address, node in zip(addresses, nodes, strict=True)]
    words = {"log": files.log, "secret": files.secret, "nodes": "\n".join(lines), "all": ",".join(addresses)}
    directory = os.path.relpath(Path(sys.executable).parent)
    _say(_WELCOME.format(bin=directory, first=addresses[0], second=addresses[1], **words))


def _watch(nodes: list[_Node], files: _Files) -> None:
    """Tell of each node that ends; return when nothing serves on any port."""
    left = list(nodes)
    while left or any(_is_served(node.port) for node in nodes):
        for node in [node for node in left if node.process.poll() is not None]:
            left.remove(node)
            how = _end_of(node.process.returncode, files)
            _say(f"{node.name} {how}; start it again: make node N={node.number}\n")
        time.sleep(_LOOK_AGAIN_S)


def _end_of(code: int, files: _Files) -> str:
    if code >= 0:
        return "ended with exit code 0" if code == 0 else f"ended with exit code {code}, see {files.log}"
    name = str(-code)
    with suppress(ValueError):  # a number that has no name
        name = signal.Signals(-code).name
    return f"was ended by signal {name}"


def _stop(nodes: list[_Node]) -> None:
    for node in nodes:
        node.process.terminate()
    try:
        if nodes:
            _say("\n" + _STOPPING.format(f"{len(nodes)} nodes" if len(nodes) > 1 else nodes[0].name))
        for node in nodes:
            node.process.wait()
    except KeyboardInterrupt:
        for node in nodes:
            node.process.kill()
            node.process.wait()
    finally:
        # The database is left to be stopped, which takes a moment.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell_of_others(nodes: list[_Node]) -> None:
    for node in nodes:
        if _is_served(node.port):
            _say(f"{_address(node.port)} still runs, now without a database: stop `make node` there\n")


def _run_node(directory: Path, arguments: list[str]) -> int:
    files = _Files.within(directory)
    ports = _ports_of_running(files.ports)
    if not ports:
        return _complain("no cluster runs here; start one with `make cluster`")
    port_by_number = {str(number): port for number, port in enumerate(ports, start=1)}
    number = "".join(arguments)
    if number not in port_by_number:
        return _complain(f"which node? say `make node N=2`, with N from 1 to {len(ports)}")
    port = port_by_number[number]
    if _is_served(port):
        return _complain(f"node {number} runs already: {_address(port)} is in use")
    server = EmbeddedPostgres.start(directory)
    if server.is_owner:
        server.stop()
        return _complain("the cluster has just ended; start one with `make cluster`")
    return _become_node(port, _environ(server.dsn, files, ports))


def _become_node(port: int, environ: dict[str, str]) -> NoReturn:
    """Replace this process by the node, so that Ctrl-C is the node's own to obey."""
    command = [*_command(port), "-log.environment=development"]
    os.execve(command[0], command, environ)  # noqa: S606  # this project's own program


def _ports_of_running(path: Path) -> list[int]:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return []
    except BlockingIOError:
        return [int(port) for port in path.read_text().split(",")]
    return []


def _environ(dsn: str, files: _Files, ports: Iterable[int]) -> dict[str, str]:
    return os.environ | {
        "MNEMOSYNED_POSTGRES_ADDRESS": dsn,
        "MNEMOSYNED_CLUSTER_SEEDS": ",".join(map(_address, ports)),
        "MNEMOSYNED_CLUSTER_SECRET_FILE": str(files.secret),
    }


def _command(port: int) -> list[str]:
    return [sys.executable, "-m", "mnemosyned", f"-port={port}", f"-cluster.listen={_address(port)}"]


def _address(port: int) -> str:
    return f"127.0.0.1:{port}"


def _joined(ports: Iterable[int]) -> str:
    return ",".join(map(str, ports))


def _is_served(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _say(text: str) -> None:
    # The terminal may be gone, and the nodes are still to be stopped.
    with suppress(OSError):
        os.write(sys.stdout.fileno(), text.encode())


def _complain(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
