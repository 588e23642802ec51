"""Servers of storages for the tests: children of this process, on free ports, with their own data."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class ChildServer:
    """One server; it may be ended, and started once more with the data that it has."""

    directory: Path
    port: int = field(default_factory=free_port, kw_only=True)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> Self:
        """Start it, with the data that it has, and wait until it answers."""
        raise NotImplementedError

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def run(self, command: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> None:
        """Start the process in the directory."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory, env=environ)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as the end of its machine would, but for what the system still writes."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
