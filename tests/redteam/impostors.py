"""Attacks on a cluster with a secret, by a machine without it that nodes dial: it must remain a stranger.

It answers at the address of a seed, or at the address of a node that has died: an address of a pod is soon
another pod's.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import grpc
from clusters import SECRET, Cluster, free_ports
from mnemosynerpc.session_pb2 import AbandonRequest, ExistsRequest, GetRequest, SetValueRequest
from redteam.fake_node import FORGED, PROOFS, FakeNode
from redteam.lab import (
    SUBJECT,
    Lab,
    Void,
    address_pair,
    attack,
    code_of,
    require,
    rings_are,
    start,
    wait_until,
)
from redteam.recorder import Recorder, Replayer
from secrecy import CANARY

_KIND: Final = "impostor"
_SESSIONS: Final = 20
_TIMEOUT_S: Final = 3.0
_LIVE: Final = ("joining", "active", "leaving", "suspect")


def _at_a_seed(proof: str, lab: Lab) -> None:
    cluster = lab.cluster(2)
    first, second = cluster.names
    (port,) = free_ports(1)
    fake = lab.enter(FakeNode(port, proof, honest=first))
    lab.launch(cluster, first, seeds=[second])
    lab.launch(cluster, second, seeds=[first, fake.address])
    lab.watch(cluster.daemons[first])
    if not rings_are(cluster, cluster.names, cluster.names, 5.0):
        # A broken node has let the impostor in; what this leads to is the next question.
        wait_until(lambda: bool(fake.heard), 5.0)
    if not wait_until(lambda: bool(fake.heard), 10.0):
        raise Void("no node has asked the impostor")
    _check_stranger(cluster, fake, cluster.names)


def _at_a_dead_members_address(proof: str, lab: Lab) -> None:
    cluster = lab.cluster(3)
    first, second, dead = cluster.names
    for name in cluster.names:
        lab.launch(cluster, name)
    require(rings_are(cluster, cluster.names, cluster.names), "the honest nodes do not find one another")
    lab.watch(cluster.daemons[first])
    kill(lab, cluster, dead)
    fake = lab.enter(FakeNode(int(dead.rpartition(":")[2]), proof, name=dead, honest=first))
    _check_stranger(cluster, fake, (first, second))


for _proof in PROOFS:
    attack(_KIND, f"at a seed's address, proof: {_proof}", quick_on=("h2",) if _proof == "none" else ())(
        partial(_at_a_seed, _proof)
    )
    attack(
        _KIND,
        f"at a dead member's address, proof: {_proof}",
        quick_on=("grpcio",) if _proof == "echo" else (),
    )(partial(_at_a_dead_members_address, _proof))


@attack(_KIND, "at a dead member's address, recorded answers byte by byte")
def _recorded_bytes(lab: Lab) -> None:
    cluster = lab.cluster(3)
    first, second, _ = cluster.names
    address, port = address_pair()
    dead, (own_port,) = address, free_ports(1)
    cluster.names[2] = dead
    recorder = lab.enter(Recorder(port, own_port))
    for name in (first, second):
        lab.launch(cluster, name)
    lab.launch(cluster, dead, f"-port={own_port}")
    require(rings_are(cluster, cluster.names, cluster.names), "the honest nodes do not find one another")
    _work(cluster, (first, second))
    lab.watch(cluster.daemons[first])
    recorder.stop()
    kill(lab, cluster, dead)
    lab.enter(Replayer(port, recorder.connections))
    _check_sessions(cluster, (first, second))
    _check_members(cluster, (first, second))


@attack(_KIND, "on the path to a member: writes and invalidations are forged, all else is relayed")
def _on_the_path(lab: Lab) -> None:
    cluster = lab.cluster(2, "-cache.ttl=1s")
    first = cluster.names[0]
    address, port = address_pair()
    cluster.names[1], (own_port,) = address, free_ports(1)
    lab.enter(FakeNode(port, "relay", name=address, honest=f"127.0.0.1:{own_port}"))
    lab.launch(cluster, first)
    lab.launch(cluster, address, f"-port={own_port}")
    # The relay loses streams: what is forwarded is forged. The two may not find one another at all, which
    # is no promise: a machine on the path can stop traffic.
    rings_are(cluster, cluster.names, [first], 5.0)
    lab.watch(cluster.daemons[first])
    _check_sessions(cluster, [first])


def kill(lab: Lab, cluster: Cluster, name: str) -> None:
    """Kill a node, and wait until its port is free."""
    daemon = cluster.daemons[name]
    lab.may_end(daemon)
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait(10)


def _check_stranger(cluster: Cluster, fake: FakeNode, honest: Sequence[str]) -> None:
    tokens = _check_sessions(cluster, honest)
    _check_members(cluster, honest)
    # What was asked again, and what the nodes did meanwhile.
    tokens += _check_sessions(cluster, honest)
    sent = fake.all_bytes
    leaked = [token for token in tokens if token.encode() in sent]
    require(not leaked, f"the impostor was sent {len(leaked)} of {len(tokens)} tokens")
    require(CANARY.encode() not in sent, "the impostor was sent bytes of a session, or a secret")
    require(SECRET.encode() not in sent, "the impostor was sent the secret")


def _check_members(cluster: Cluster, honest: Sequence[str]) -> None:
    right = rings_are(cluster, honest, honest)
    shares = {name: cluster.page(name)["ring"]["nodes"] for name in honest}
    require(right, f"the impostor owns tokens: the honest are {list(honest)}, the rings {shares}")
    for name in honest:
        live = {one["name"] for one in cluster.page(name)["members"] if one["status"] in _LIVE}
        require(live <= set(honest), f"the impostor is a member: {name} has {sorted(live)}")


def _check_sessions(cluster: Cluster, honest: Sequence[str]) -> list[str]:
    """Start, read, change and end sessions through the honest nodes; return their tokens."""
    tokens: list[str] = []
    for number in range(_SESSIONS):
        with cluster.daemons[honest[number % len(honest)]].stub() as stub:
            tokens.append(start(stub))
    require(all(len(token) == 128 and len(set(token)) > 1 for token in tokens), "a Start was forged")
    for name in honest:
        _check_reads(cluster, name, tokens)
    _check_ends(cluster, honest, tokens[:5])
    return tokens


def _check_reads(cluster: Cluster, name: str, tokens: Sequence[str]) -> None:
    forged, failures = 0, []
    with cluster.daemons[name].stub() as stub:
        for token in tokens:
            try:
                session = stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S).session
                changed = stub.SetValue(
                    SetValueRequest(access_token=token, key="n", value="1"), timeout=_TIMEOUT_S
                )
            except grpc.RpcError as error:
                failures.append(code_of(error).name)
                continue
            forged += session.subject_id != SUBJECT or "role" in changed.bag
    require(not forged, f"{forged} of {len(tokens)} sessions read at {name} were forged as {FORGED}")
    require(not failures, f"{len(failures)} of {len(tokens)} reads at {name} failed: {set(failures)}")


def _check_ends(cluster: Cluster, honest: Sequence[str], tokens: Sequence[str]) -> None:
    alive: list[str] = []
    for number, token in enumerate(tokens):
        with cluster.daemons[honest[number % len(honest)]].stub() as stub, suppress(grpc.RpcError):
            stub.Abandon(AbandonRequest(access_token=token), timeout=_TIMEOUT_S)
        for name in honest:
            with cluster.daemons[name].stub() as stub, suppress(grpc.RpcError):
                stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S)
                alive.append(token)
            with cluster.daemons[name].stub() as stub, suppress(grpc.RpcError):
                if stub.Exists(ExistsRequest(access_token=token), timeout=_TIMEOUT_S).value:
                    alive.append(token)
    require(not alive, f"{len(set(alive))} of {len(tokens)} ended sessions are still answered")


def _work(cluster: Cluster, names: Sequence[str]) -> None:
    """Make calls of every kind, so that nodes talk to one another."""
    for name in names:
        with cluster.daemons[name].stub() as stub:
            for token in [start(stub) for _ in range(10)]:
                stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S)
                stub.Abandon(AbandonRequest(access_token=token), timeout=_TIMEOUT_S)
    time.sleep(0.5)  # for the gossip that follows; nothing depends on it


@attack(_KIND, "a listener at a dead member's address that never answers")
def _silent(lab: Lab) -> None:
    cluster = lab.cluster(3)
    first, second, dead = cluster.names
    for name in cluster.names:
        lab.launch(cluster, name)
    require(rings_are(cluster, cluster.names, cluster.names), "the honest nodes do not find one another")
    lab.watch(cluster.daemons[first])
    kill(lab, cluster, dead)
    lab.enter(socket.create_server(("127.0.0.1", int(dead.rpartition(":")[2])), reuse_port=False))
    _check_sessions(cluster, (first, second))
    _check_members(cluster, (first, second))
