"""Records TCP connections between nodes, byte by byte, and plays them back in either direction."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Recorded:
    """One connection: what each side sent, in all."""

    to_server: bytearray = field(default_factory=bytearray)
    to_client: bytearray = field(default_factory=bytearray)


class _Listener:
    """Accepts on a port of loopback until it is stopped; each connection has a thread."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Self:
        end_s = time.monotonic() + 5
        while True:
            try:
                self._listener = socket.create_server(("127.0.0.1", self._port))
            except OSError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.02)
            else:
                break
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Accept no more; connections that are open go on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        raise NotImplementedError


class Recorder(_Listener):
    """Passes connections on to a server, and keeps what both sides sent."""

    def __init__(self, port: int, target_port: int) -> None:
        super().__init__(port)
        self.connections: list[Recorded] = []
        self._target_port = target_port

    def _serve(self, connection: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        except OSError:
            connection.close()
            return
        server.settimeout(None)
        recorded = Recorded()
        self.connections.append(recorded)
        with connection, server:
            back = threading.Thread(target=_pump, args=(server, connection, recorded.to_client), daemon=True)
            back.start()
            _pump(connection, server, recorded.to_server)
            back.join()


def _pump(source: socket.socket, target: socket.socket, copy: bytearray) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65_536):
            copy += part
            target.sendall(part)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Replayer(_Listener):
    """Says to each client what a server has said before, a connection after the other."""

    def __init__(self, port: int, connections: Sequence[Recorded]) -> None:
        super().__init__(port)
        self._answers = [bytes(one.to_client) for one in connections if one.to_client]
        self._next = 0

    def _serve(self, connection: socket.socket) -> None:
        answer = self._answers[self._next % len(self._answers)]
        self._next += 1
        with connection, contextlib.suppress(OSError):
            connection.sendall(answer)
            while connection.recv(65_536):
                pass


def replay(address: str, connections: Sequence[Recorded], wait_s: float = 1.5) -> None:
    """Say to a server what its clients have said before; return when it has had time to act on it."""
    host, _, port = address.rpartition(":")
    opened: list[socket.socket] = []
    for one in connections:
        with contextlib.suppress(OSError):
            client = socket.create_connection((host, int(port)), timeout=2)
            opened.append(client)
            client.sendall(bytes(one.to_server))
    time.sleep(wait_s)
    for client in opened:
        client.close()
