"""The network loses what it is told to lose, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from networks import IS_POSSIBLE, Network

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="network namespaces need root, ip and nft")
_LISTEN = """
import socket
listener = socket.socket(type=socket.SOCK_DGRAM)
listener.bind(("", 9999))
print("ready", flush=True)
print(listener.recv(100).decode(), flush=True)
"""
_SEND = """
import socket, sys
socket.socket(type=socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), (sys.argv[1], 9999))
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["a", "b"]) as one:
        yield one


class Listener:
    """A process on a host that tells the first word that reaches it."""

    def __init__(self, network: Network, host: str) -> None:
        self._process = subprocess.Popen(
            [*network.inside(host), sys.executable, "-c", _LISTEN], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def first_word(self) -> str:
        out, _ = self._process.communicate(timeout=20)
        return out.strip()


def send(network: Network, source: str, target: str, word: str) -> None:
    command = [sys.executable, "-c", _SEND, network.addresses[target], word]
    subprocess.run([*network.inside(source), *command], check=True, timeout=20)


def test_what_is_lost_in_one_direction_passes_in_the_other(network: Network) -> None:
    forth, back = Listener(network, "b"), Listener(network, "a")
    network.lose([("a", "b")])
    send(network, "a", "b", "lost")
    send(network, "b", "a", "passed")
    network.keep([("a", "b")])
    send(network, "a", "b", "kept")

    assert forth.first_word() == "kept"
    assert back.first_word() == "passed"


def test_what_is_lost_twice_is_kept_after_both_have_ended(network: Network) -> None:
    listener = Listener(network, "b")
    network.lose([("a", "b")])
    network.lose([("a", "b")])
    network.keep([("a", "b")])
    send(network, "a", "b", "lost")
    network.keep([("a", "b")])
    send(network, "a", "b", "kept")

    assert listener.first_word() == "kept"
