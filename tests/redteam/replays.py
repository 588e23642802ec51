"""Attacks with what nodes have said before: recorded bytes, and calls sent back to their maker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from clusters import SECRET, Cluster, free_ports
from mnemosynerpc.session_pb2 import DeleteRequest, GetRequest, SetValueRequest
from processes import Daemon, mnemosyned
from redteam.fake_node import SERVICE, FakeNode, Heard
from redteam.lab import Lab, Void, address_pair, attack, metric, require, rings_are, start, wait_until
from redteam.recorder import Recorded, Recorder, replay

_KIND: Final = "replay"
_METHODS: Final = ("Invalidate", "Leave")


@dataclass
class _Recording:
    """Two nodes, and what the first said to the second over the recorder."""

    cluster: Cluster
    first: str
    second: str  # dialled over the recorder
    own_port: int  # where the second really listens
    recorder: Recorder
    tokens: list[str]

    @property
    def flags(self) -> list[str]:
        return [f"-port={self.own_port}"]

    @property
    def real_address(self) -> str:
        return f"127.0.0.1:{self.own_port}"

    @property
    def connections(self) -> list[Recorded]:
        return list(self.recorder.connections)


def _recording(lab: Lab, *, leaves: bool = False) -> _Recording:
    """Have two nodes say everything that nodes say, and record it."""
    cluster = lab.cluster(1)
    (first,) = cluster.names
    second, port = address_pair()
    cluster.names.append(second)
    (own_port,) = free_ports(1)
    recorder = lab.enter(Recorder(port, own_port))
    lab.enter(Recorder(port + 1, own_port + 1))
    recording = _Recording(cluster, first, second, own_port, recorder, [])
    lab.launch(cluster, first)
    lab.launch(cluster, second, *recording.flags)
    require(rings_are(cluster, cluster.names, cluster.names), "the two nodes do not find one another")
    lab.watch(cluster.daemons[first])
    with cluster.daemons[first].stub() as stub:
        recording.tokens = [start(stub) for _ in range(10)]
        for token in recording.tokens:
            stub.SetValue(SetValueRequest(access_token=token, key="n", value="recorded"), timeout=3)
        # Every node is told of these, whoever owns the tokens.
        start(stub, subject="other")
        stub.Delete(DeleteRequest(subject_id="other"), timeout=3)
    if not metric(cluster.daemons[second], r'requests_total.*"Invalidate"'):
        raise Void("no Invalidate was recorded")
    if leaves:
        _leave(lab, recording)
    return recording


def _leave(lab: Lab, recording: _Recording) -> None:
    daemon = recording.cluster.daemons[recording.second]
    lab.may_end(daemon)
    code, _, complaint = mnemosyned(
        "cluster", "leave", f"-node={recording.second}", MNEMOSYNED_CLUSTER_SECRET=SECRET
    )
    if code:
        raise Void(f"mnemosyned cluster leave: {complaint}")
    daemon.process.wait(20)


def _restart(lab: Lab, recording: _Recording) -> Daemon:
    """Start the second node again at the same address."""
    before = recording.cluster.daemons[recording.second]
    lab.may_end(before)
    if before.process.poll() is None:
        before.process.send_signal(signal.SIGKILL)
        before.process.wait(10)
    daemon = lab.launch(recording.cluster, recording.second, *recording.flags)
    require(rings_are(recording.cluster, recording.cluster.names, [recording.second]), "it does not rejoin")
    return daemon


def _check(recording: _Recording, daemon: Daemon, play: Callable[[], None]) -> None:
    """Play the recording, and require that the daemon did nothing of it."""
    before = _done(daemon)
    with recording.cluster.daemons[recording.first].stub() as stub:
        for token in recording.tokens:
            stub.SetValue(SetValueRequest(access_token=token, key="n", value="since"), timeout=3)
        quiet = _quiet(daemon)
        play()
        wait_until(lambda: daemon.process.poll() is not None, 1.0)
        require(daemon.process.poll() is None, "a recorded Leave ended the node")
        done = {method: _done(daemon)[method] - quiet[method] for method in quiet}
        require(not any(done.values()), f"recorded calls were done again: {done}, before {before}")
        bags = [stub.Get(GetRequest(access_token=token), timeout=3).session.bag for token in recording.tokens]
    undone = sum(bag["n"] != "since" for bag in bags)
    require(not undone, f"{undone} recorded writes were done again")


def _quiet(daemon: Daemon) -> dict[str, float]:
    """Wait until the nodes tell one another nothing more; return what was done by then."""
    before, since_s = _done(daemon), time.monotonic()
    end_s = since_s + 10.0
    while time.monotonic() - since_s < 1.0 and time.monotonic() < end_s:
        now = _done(daemon)
        if now != before:
            before, since_s = now, time.monotonic()
        time.sleep(0.1)
    return before


def _done(daemon: Daemon) -> dict[str, float]:
    """Return how often each of the nodes' calls was answered with OK."""
    return {method: metric(daemon, rf'requests_total.*code="OK".*"{method}"') for method in _METHODS}


@attack(_KIND, "recorded connections, to the same process")
def _same_process(lab: Lab) -> None:
    recording = _recording(lab)
    daemon = recording.cluster.daemons[recording.second]
    _check(recording, daemon, lambda: replay(recording.real_address, recording.connections))


@attack(_KIND, "recorded connections, to another node")
def _other_node(lab: Lab) -> None:
    recording = _recording(lab)
    daemon = recording.cluster.daemons[recording.first]
    _check(recording, daemon, lambda: replay(recording.first, recording.connections))


@attack(_KIND, "recorded connections, to the next process at the address")
def _next_process(lab: Lab) -> None:
    recording = _recording(lab)
    connections = recording.connections
    daemon = _restart(lab, recording)
    _check(recording, daemon, lambda: replay(recording.real_address, connections))


@attack(_KIND, "a recorded Leave, to the next process at the address", quick_on=("h2",))
def _leave_next_process(lab: Lab) -> None:
    recording = _recording(lab, leaves=True)
    connections = recording.connections
    daemon = _restart(lab, recording)
    _check(recording, daemon, lambda: replay(recording.real_address, connections))


@attack(_KIND, "a node's own calls, sent back to it and to another node")
def _reflected(lab: Lab) -> None:
    cluster = lab.cluster(2)
    first, second = cluster.names
    (port,) = free_ports(1)
    fake = lab.enter(FakeNode(port, "none"))
    lab.launch(cluster, first, seeds=[second])
    lab.launch(cluster, second, seeds=[first, fake.address])
    lab.watch(cluster.daemons[first])
    if not wait_until(lambda: bool(fake.heard), 10.0):
        raise Void("no node has asked the impostor")
    time.sleep(1.0)  # what else it asks; nothing depends on it
    heard = list(fake.heard)
    for name in cluster.names:
        daemon = cluster.daemons[name]
        before = _done(daemon)
        for method in ("", "Invalidate", "Leave", "Forward"):
            _send_back(daemon.address, heard, method)
        require(_done(daemon) == before, "a call with the signature of another call was done")
        require(daemon.process.poll() is None, "a Leave with the signature of another call ended the node")


def _send_back(address: str, heard: Sequence[Heard], method: str) -> None:
    """Make the calls that were heard, under their own method or under this one."""
    with grpc.insecure_channel(address) as channel:
        for one in heard[:10]:
            unary = channel.unary_unary(f"/{SERVICE}/{method or one.method}")
            metadata = [(key, value) for key, value in one.metadata if key.startswith("mnemosyne")]
            for body in {one.body, b"", address.encode()}:
                try:
                    unary(body, metadata=metadata, timeout=2)
                except grpc.RpcError:
                    continue
