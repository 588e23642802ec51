"""Hosts with addresses of their own on one machine: network namespaces on a bridge, for root only.

A wall between hosts drops what they send one another, without a word, as a broken switch does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

IS_POSSIBLE = os.geteuid() == 0 and shutil.which("nft") is not None and shutil.which("ip") is not None


# A name with the address of each host, as a headless Service has.
EVERYBODY = "everybody"
# An address of this process for what the nodes store in, so that a wall may stand before it alone.
STORAGE = "storage"
# A packet between hosts is forwarded; one from or to an address of this process is not.
_HOOKS = ("forward", "input", "output")


class Network:
    """Hosts by name; each knows the names of all, as from DNS. This process has an address there too."""

    def __init__(self, names: Iterable[str]) -> None:
        self._id = f"mn{os.getpid() % 100_000}"
        # Two at once, in two test processes, need different ones.
        self._subnet = f"10.{77 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
        self.address = f"{self._subnet}.1"
        self.storage_address = f"{self._subnet}.2"
        self.addresses = {name: f"{self._subnet}.{number}" for number, name in enumerate(names, 10)}
        self._next = 10 + len(self.addresses)
        self._losses: Counter[tuple[str, str, int]] = Counter()

    def inside(self, name: str) -> list[str]:
        """Return the words before a command that is to run on this host."""
        return ["ip", "netns", "exec", self._namespace(name)]

    def move(self, name: str) -> None:
        """Give a host another address, and its name to it."""
        old, new = self.addresses[name], f"{self._subnet}.{self._next}"
        self._next += 1
        run(*self.inside(name), "ip", "address", "delete", f"{old}/24", "dev", "eth0")
        run(*self.inside(name), "ip", "address", "add", f"{new}/24", "dev", "eth0")
        self.addresses[name] = new
        self._write_hosts()

    def separate(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Put a wall between these and those."""
        some, others = list(some), list(others)
        for one in some:
            for other in others:
                for source, target in ((one, other), (other, one)):
                    addresses = ("ip", "saddr", self.addresses[source], "ip", "daddr", self.addresses[target])
                    run("nft", "add", "rule", "bridge", self._id, "wall", *addresses, "drop")

    def lose(self, pairs: Iterable[tuple[str, str]], percent: int = 100) -> None:
        """Drop this share of what the first of each pair sends to the second, until `keep` says the same.

        Each call counts: what is lost twice is kept after two calls of `keep`.
        """
        self._losses.update((source, target, percent) for source, target in pairs)
        self._write_losses()

    def keep(self, pairs: Iterable[tuple[str, str]], percent: int = 100) -> None:
        """End what `lose` began."""
        self._losses.subtract((source, target, percent) for source, target in pairs)
        self._write_losses()

    def _write_losses(self) -> None:
        addresses = self.addresses | {STORAGE: self.storage_address}
        lines = [f"flush chain bridge {self._id} {hook}" for hook in _HOOKS]
        for source, target, percent in (+self._losses).elements():
            words = f"ip saddr {addresses[source]} ip daddr {addresses[target]}"
            share = "" if percent == 100 else f"numgen random mod 100 < {percent}"
            lines += [f"add rule bridge {self._id} {hook} {words} {share} drop" for hook in _HOOKS]
        # At once, or not at all.
        run("nft", "-f", "-", text="\n".join(lines))

    def join(self) -> None:
        """Remove all walls."""
        run("nft", "flush", "chain", "bridge", self._id, "wall")

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        run("ip", "link", "add", self._id, "type", "bridge")
        run("ip", "address", "add", f"{self.address}/24", "dev", self._id)
        run("ip", "address", "add", f"{self.storage_address}/24", "dev", self._id)
        run("ip", "link", "set", self._id, "up")
        for number, name in enumerate(self.addresses):
            self._add_host(number, name)
        run("nft", "add", "table", "bridge", self._id)
        hook = "{ type filter hook forward priority 0; }"
        run("nft", "add", "chain", "bridge", self._id, "wall", hook)
        for name in _HOOKS:
            hook = f"{{ type filter hook {name} priority 1; }}"
            run("nft", "add", "chain", "bridge", self._id, name, hook)
        self._write_hosts()

    def __exit__(self, *_: object) -> None:
        run("nft", "delete", "table", "bridge", self._id, is_checked=False)
        for number, name in enumerate(self.addresses):
            # The namespace would take it along, but later.
            run("ip", "link", "delete", f"{self._id}v{number}", is_checked=False)
            run("ip", "netns", "delete", self._namespace(name), is_checked=False)
            shutil.rmtree(self._directory(name), ignore_errors=True)
        run("ip", "link", "delete", self._id, is_checked=False)

    def _add_host(self, number: int, name: str) -> None:
        namespace, outer = self._namespace(name), f"{self._id}v{number}"
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", outer, "master", self._id, "up")
        run(*self.inside(name), "ip", "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        run(*self.inside(name), "ip", "link", "set", "eth0", "up")
        run(*self.inside(name), "ip", "link", "set", "lo", "up")

    def _namespace(self, name: str) -> str:
        return f"{self._id}-{name}"

    def _directory(self, name: str) -> Path:
        # `ip netns exec` shows what is here as /etc.
        return Path("/etc/netns") / self._namespace(name)

    def _write_hosts(self) -> None:
        hosts: Mapping[str, str] = {"localhost": "127.0.0.1"} | self.addresses
        lines = "".join(f"{address} {name}\n" for name, address in hosts.items())
        lines += "".join(f"{address} {EVERYBODY}\n" for address in self.addresses.values())
        for name in self.addresses:
            self._directory(name).mkdir(parents=True, exist_ok=True)
            # In place: what runs there has this very file mounted.
            (self._directory(name) / "hosts").write_text(lines)


class Relay:
    """Passes connections to one address on to a server on loopback."""

    def __init__(self, host: str, target_port: int) -> None:
        self.delay_s = 0.0  # of each part of a stream, in both directions
        self._target_port = target_port
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def point_to(self, port: int) -> None:
        """Pass further connections on to another server, and cut those to the former one."""
        self._target_port = port
        self.cut()

    def cut(self) -> None:
        """End all connections."""
        for one in list(self._open):
            _shut(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        # A server that is away refuses: its client then sees an end of the connection.
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._target_port)) as server,
        ):
            for one in (client, server):
                # Else a reply in two parts, as of a script and the wait behind it, is held up for 40 ms.
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open |= {client, server}
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()
            self._open -= {client, server}

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65_536):
                if self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(part)
        for one in (source, target):
            _shut(one)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closed alone, a listener goes on waiting in its thread.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


def run(*command: str, is_checked: bool = True, text: str = "") -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20, input=text)
    assert done.returncode == 0 or not is_checked, f"{command}: {done.stderr}"
