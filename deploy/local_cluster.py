"""Three nodes and a storage of their own on this machine, for trying out.

`make cluster` runs them until Ctrl-C, or until the terminal is closed. `make node N=2` starts the second one
again after it has died. `make cluster ARGS=-storage=redis` gives each node this flag, and any other. The
private server is this process's child, and the nodes share it. What both commands need is in
`~/.local/share/mnemosyned/cluster`:

    running.json   the nodes' ports and flags; locked by the process that runs the cluster
    secret         the nodes' secret; a cluster makes its own
    log            the nodes' log

CLUSTER_PORTS in the environment replaces the ports, as in `make cluster CLUSTER_PORTS=9080,9082,9084`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn, TextIO

from mnemosyned import settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.config.help import actions_in
from mnemosyned.embedded.address import data_directory
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.engines import PrivateServer, StorageConfig

_PORTS: Final = "8080,8082,8084"
_NODES: Final = 3
# As `make run` has them: the chosen engine's counts.
_PRIVATE: Final = ("-postgres.address=embedded:", "-redis.address=embedded:")
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
    """Run the cluster, each node with these flags; as `node NUMBER`, a node of one that runs already."""
    try:
        files = _Files.within(data_directory("embedded:", os.environ, "cluster"))
        if arguments[:1] == ["node"]:
            return _run_node(files, arguments[1:])
        return _run_cluster(files, arguments)
    except (ConfigError, StorageRefused) as exc:
        return _complain(str(exc))
    except KeyboardInterrupt:  # before there was a node
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    running: Path
    secret: Path
    log: Path

    @classmethod
    def within(cls, directory: Path) -> _Files:
        return cls(running=directory / "running.json", secret=directory / "secret", log=directory / "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    """What its nodes have in common."""

    ports: Sequence[int]
    flags: Sequence[str]

    def command(self, port: int, files: _Files) -> list[str]:
        """Return the command of the node with this port."""
        own = {
            "port": port,
            "cluster.listen": _address(port),
            "cluster.seeds": ",".join(map(_address, self.ports)),
            "cluster.secret.file": files.secret,
        }
        # Of a flag that is given twice, the last one counts.
        flags = [*_PRIVATE, *self.flags, *(f"-{name}={value}" for name, value in own.items())]
        return [sys.executable, "-m", "mnemosyned", *flags]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    number: int
    port: int
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return f"node {self.number} ({_address(self.port)}, pid {self.process.pid})"


def _run_cluster(files: _Files, flags: list[str]) -> int:
    """Run until Ctrl-C, or until no node is left. When a node dies, only the other nodes react."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _hang_up)
    numbers = os.environ.get("CLUSTER_PORTS", _PORTS).split(",")
    if len(numbers) != _NODES or not all(number.isdecimal() for number in numbers):
        return _complain("CLUSTER_PORTS must be three numbers, as in 8080,8082,8084")
    cluster = _Cluster(ports=[int(number) for number in numbers], flags=flags)
    files.running.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.running.open("a") as claim:
        if not _has_claimed(claim, cluster):
            return _complain("a cluster runs already; `make node N=2` starts a node of it again")
        files.secret.touch(mode=0o600)
        files.secret.write_text(secrets.token_hex(32) + "\n")
        server = _storage_of(flags)
        try:
            return _run_nodes(cluster, files)
        finally:
            if server is not None:
                server.stop()


def _storage_of(flags: list[str]) -> PrivateServer | None:
    """Start the private server of the engine that the flags choose; None: it has none, or has an address.

    Raises:
        ConfigError: a flag is wrong, or the engine keeps sessions for one node only.
        StorageRefused: the server cannot be run.
    """
    actions = actions_in(flags)
    config = settings.parse([*_PRIVATE, *([] if actions else flags)], os.environ)
    if config[settings.RunConfig].only_checks:
        actions.add("check-config")
    if actions:
        raise ConfigError(f"-{min(actions)} is for mnemosyned itself: no node would run")
    engine = config[StorageConfig].engine
    if not engine.capabilities.is_shared:
        raise ConfigError(f"flag -storage: {engine.name} is for one node; a cluster shares its sessions")
    return engine.start_server(config)


def _run_nodes(cluster: _Cluster, files: _Files) -> int:
    nodes: list[_Node] = []
    try:
        with files.log.open("ab") as log:
            nodes += _started(cluster, files, log)
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


def _has_claimed(file: TextIO, cluster: _Cluster) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # A flag may hold a secret.
    os.fchmod(file.fileno(), 0o600)
    file.truncate(0)
    json.dump(asdict(cluster), file)
    file.flush()
    return True


def _started(cluster: _Cluster, files: _Files, log: BinaryIO) -> Iterable[_Node]:
    for number, port in enumerate(cluster.ports, start=1):
        process = subprocess.Popen(
            cluster.command(port, files),
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


def _run_node(files: _Files, arguments: list[str]) -> int:
    cluster = _running(files.running)
    if cluster is None:
        return _complain("no cluster runs here; start one with `make cluster`")
    port_by_number = {str(number): port for number, port in enumerate(cluster.ports, start=1)}
    number = "".join(arguments)
    if number not in port_by_number:
        return _complain(f"which node? say `make node N=2`, with N from 1 to {len(cluster.ports)}")
    port = port_by_number[number]
    if _is_served(port):
        return _complain(f"node {number} runs already: {_address(port)} is in use")
    return _become([*cluster.command(port, files), "-log.environment=development"])


def _become(command: list[str]) -> NoReturn:
    """Replace this process by the node, so that Ctrl-C is the node's own to obey."""
    os.execv(command[0], command)  # noqa: S606  # this project's own program


def _running(path: Path) -> _Cluster | None:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _Cluster(**json.loads(path.read_text()))
    return None


def _address(port: int) -> str:
    return f"127.0.0.1:{port}"


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
