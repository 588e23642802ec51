"""Three nodes and a PostgreSQL on this machine, for trying out: `make cluster`. Ctrl-C stops them all."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from mnemosyned.embedded.server import EmbeddedError, EmbeddedPostgres, data_directory

PORTS = (8080, 8082, 8084)
ADDRESSES = [f"127.0.0.1:{port}" for port in PORTS]
WELCOME = """
three nodes of one cluster; their log is {log}
{nodes}
  look at it     {bin}/mnemosyned cluster members
  read from it   {bin}/python -m mnemosynerpc.reader
  kill one       kill -9 its pid, and go on reading
  let one leave  {bin}/mnemosyned cluster leave -node 127.0.0.1:8082 -cluster.secret.file {secret}
  stop them all  Ctrl-C

"""


def main() -> int:
    """Run until Ctrl-C, or until no node is left; what a node leaves behind is the others' to cope with."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server = EmbeddedPostgres.start(data_directory("embedded:", os.environ))
    except EmbeddedError as exc:
        sys.stderr.write(f"embedded PostgreSQL: {exc}\n")
        return 1
    log_path, secret_path = server.directory / "cluster.log", server.directory / "cluster.secret"
    secret_path.touch(mode=0o600)
    secret_path.write_text(secrets.token_hex(32) + "\n")
    environ = os.environ | {
        "MNEMOSYNED_POSTGRES_ADDRESS": server.dsn,
        "MNEMOSYNED_CLUSTER_SEEDS": ",".join(ADDRESSES),
        "MNEMOSYNED_CLUSTER_SECRET_FILE": str(secret_path),
    }
    with server, log_path.open("ab") as log:
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            nodes += (_start(port, environ, log) for port in PORTS)
            lines = [f"  {address}  pid {node.pid}" for address, node in zip(ADDRESSES, nodes, strict=True)]
            words = {"log": log_path, "secret": secret_path, "nodes": "\n".join(lines)}
            sys.stdout.write(WELCOME.format(bin=os.path.relpath(Path(sys.executable).parent), **words))
            sys.stdout.flush()
            while any(node.poll() is None for node in nodes):
                time.sleep(0.2)
        except KeyboardInterrupt:
            return 0
        finally:
            _stop(nodes)
    return 1


def _start(port: int, environ: dict[str, str], log: object) -> subprocess.Popen[bytes]:
    flags = [f"-port={port}", f"-cluster.listen=127.0.0.1:{port}"]
    # In a session of its own: Ctrl-C is this process's to pass on.
    return subprocess.Popen(
        [sys.executable, "-m", "mnemosyned", *flags],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=log,  # type: ignore[arg-type]  # a file
        start_new_session=True,
    )


def _stop(nodes: list[subprocess.Popen[bytes]]) -> None:
    for node in nodes:
        if node.poll() is None:
            node.terminate()
    for node in nodes:
        node.wait()


if __name__ == "__main__":
    sys.exit(main())
