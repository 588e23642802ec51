"""Whether this container's daemon is alive: `python -m mnemosyned.commands.healthcheck`, for HEALTHCHECK.

Asks `/healthz` on the admin port, where the daemon of this container has it:

    flags of the daemon's process (/proc) ─┐
    environment, which both share ─────────┼──> -host, -port, -tls ──> http(s)://host:port+1/healthz
    the configuration file of both ────────┘

- Flags after the command's name take the place of those of the process: `… healthcheck -port=9000`.
- The daemon is process 1 of the container, or a child of it: a shell or an init may be process 1.
- Other settings are not read, so that a file which only the daemon may read does no harm.

Exit codes: 0 alive, 1 not alive. Alive and not ready: `/healthz` does not depend on the storage. A daemon
without its database serves cached sessions and recovers by itself, and a restart would only lose its cache.
`/healthr` tells readiness.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Final

from mnemosyned.config import config
from mnemosyned.config.flags import ConfigError
from mnemosyned.observe import stdio
from mnemosyned.security.config import TlsConfig
from mnemosyned.security.process_title import PROGRAM
from mnemosyned.settings import SECTIONS
from mnemosyned.transport.acceptor import reached_at
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import UNIX_PREFIX, host_port

_TIMEOUT_S: Final = 2.5


def main() -> int:
    """Ask once, within 2.5 s; return the exit code."""
    stdio.secure()
    try:
        url, context = _where(sys.argv[1:] or _arguments_of_the_daemon())
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(url, timeout=_TIMEOUT_S):
            return 0
    except (OSError, HTTPException, ConfigError) as exc:
        sys.stderr.write(f"mnemosyned: not alive: {exc}\n")
        return 1


def _where(arguments: Sequence[str]) -> tuple[str, ssl.SSLContext | None]:
    """Return the URL to ask, and how if it is one of TLS. Raises ConfigError."""
    found = config.parse(arguments, os.environ, SECTIONS, only=(GrpcConfig, TlsConfig))
    grpc = found[GrpcConfig]
    if not grpc.port:
        raise ConfigError("flag -port: 0 is any port, and the health check cannot know which")
    host = "127.0.0.1" if grpc.host.startswith(UNIX_PREFIX) else reached_at(grpc.host)
    address = host_port(host, grpc.port + 1)
    if not found[TlsConfig].is_on:
        return f"http://{address}/healthz", None
    # The certificate is for the node's name and not for this address. The connection stays inside the
    # container, so nothing is verified.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return f"https://{address}/healthz", context


def _arguments_of_the_daemon() -> list[str]:
    """Return the flags of the daemon that is process 1, or a child of it; no flags without one."""
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):  # it has ended
            line = (process / "cmdline").read_bytes().decode(errors="replace")
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            arguments = _flags_in(line)
            if arguments is not None and (process.name == "1" or parent == "1"):
                return arguments
    return []


def _flags_in(command_line: str) -> list[str] | None:
    """Return the flags of a daemon's command line; None: it is another program's."""
    words = command_line.rstrip("\0").split("\0")
    if words[0].startswith(f"{PROGRAM} "):
        # A process title (security/process_title.py): one text, without its secrets.
        words = words[0].split(" ")
    for at, word in enumerate(words[:3]):
        # `mnemosyned …`, `python /usr/bin/mnemosyned …` or `python -m mnemosyned …`
        if Path(word).name == PROGRAM:
            flags = words[at + 1 :]
            return flags if not flags or flags[0].startswith("-") else None
    return None


if __name__ == "__main__":
    sys.exit(main())
