"""Attacks on a cluster with a secret, by a machine without it that nodes dial: it must remain a stranger.

It answers at the address of a seed, or at the address of a node that has died: an address of a pod is soon
another pod's.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import grpc
from certificates import Authority
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
    # Only the second node asks the impostor.
    fake = lab.enter(FakeNode(port, proof, honest=second if proof == "reflected" else first))
    lab.launch(cluster, first, seeds=[second])
    lab.launch(cluster, second, seeds=[first, fake.address])
    lab.watch(cluster.daemons[first])
    if not rings_are(cluster, cluster.names, cluster.names, 5.0):
        # A broken node has let the impostor in; what this leads to is the next question.
        wait_until(lambda: bool(fake.heard), 5.0)
    if not wait_until(lambda: bool(fake.heard), 10.0):
        raise Void("no node has asked the impostor")
    _check_stranger(lab, cluster, fake, cluster.names)


def _at_a_dead_members_address(proof: str, lab: Lab) -> None:
    cluster = lab.cluster(3)
    first, second, dead = cluster.names
    for name in cluster.names:
        lab.launch(cluster, name)
    require(rings_are(cluster, cluster.names, cluster.names), "the honest nodes do not find one another")
    lab.watch(cluster.daemons[first])
    kill(lab, cluster, dead)
    fake = lab.enter(FakeNode(int(dead.rpartition(":")[2]), proof, name=dead, honest=first))
    _check_stranger(lab, cluster, fake, (first, second))


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
    _work(lab, cluster, (first, second))
    lab.watch(cluster.daemons[first])
    recorder.stop()
    kill(lab, cluster, dead)
    lab.enter(Replayer(port, recorder.connections))
    _check_sessions(lab, cluster, (first, second))
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
    _check_sessions(lab, cluster, [first])


def kill(lab: Lab, cluster: Cluster, name: str) -> None:
    """Kill a node, and wait until its port is free."""
    daemon = cluster.daemons[name]
    lab.may_end(daemon)
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait(10)


def _check_stranger(lab: Lab, cluster: Cluster, fake: FakeNode, honest: Sequence[str]) -> None:
    tokens = _check_sessions(lab, cluster, honest)
    _check_members(cluster, honest)
    # What was asked again, and what the nodes did meanwhile.
    tokens += _check_sessions(lab, cluster, honest)
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


def _check_sessions(lab: Lab, cluster: Cluster, honest: Sequence[str]) -> list[str]:
    """Start, read, change and end sessions through the honest nodes; return their tokens."""
    tokens: list[str] = []
    for number in range(_SESSIONS):
        with lab.stub(cluster.daemons[honest[number % len(honest)]]) as stub:
            tokens.append(start(stub))
    require(all(len(token) == 128 and len(set(token)) > 1 for token in tokens), "a Start was forged")
    for name in honest:
        _check_reads(lab, cluster, name, tokens)
    _check_ends(lab, cluster, honest, tokens[:5])
    return tokens


def _check_reads(lab: Lab, cluster: Cluster, name: str, tokens: Sequence[str]) -> None:
    forged, failures = 0, []
    with lab.stub(cluster.daemons[name]) as stub:
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


def _check_ends(lab: Lab, cluster: Cluster, honest: Sequence[str], tokens: Sequence[str]) -> None:
    alive: list[str] = []
    for number, token in enumerate(tokens):
        with lab.stub(cluster.daemons[honest[number % len(honest)]]) as stub, suppress(grpc.RpcError):
            stub.Abandon(AbandonRequest(access_token=token), timeout=_TIMEOUT_S)
        for name in honest:
            with lab.stub(cluster.daemons[name]) as stub, suppress(grpc.RpcError):
                stub.Get(GetRequest(access_token=token), timeout=_TIMEOUT_S)
                alive.append(token)
            with lab.stub(cluster.daemons[name]) as stub, suppress(grpc.RpcError):
                if stub.Exists(ExistsRequest(access_token=token), timeout=_TIMEOUT_S).value:
                    alive.append(token)
    require(not alive, f"{len(set(alive))} of {len(tokens)} ended sessions are still answered")


def _work(lab: Lab, cluster: Cluster, names: Sequence[str]) -> None:
    """Make calls of every kind, so that nodes talk to one another."""
    for name in names:
        with lab.stub(cluster.daemons[name]) as stub:
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
    _check_sessions(lab, cluster, (first, second))
    _check_members(cluster, (first, second))


# By what certificate the impostor is known: none of these is a node's.
_CERTIFICATES: Final = ("none", "another authority", "a client's name", "a name that looks like a node's")
_NODE_NAME: Final = "node.nodes.example"


def _by_certificate(certificate: str, lab: Lab) -> None:
    authority = Authority(lab.scratch / "ca")
    flags = [*authority.flags("127.0.0.1", _NODE_NAME), "-tls.client-auth=require"]
    flags.append("-tls.peer-names=*.nodes.example")
    cluster = lab.cluster(2, *flags, secret="")
    first, second = cluster.names
    (port,) = free_ports(1)
    fake = lab.enter(FakeNode(port, "none", credentials=_credentials(certificate, lab, authority)))
    lab.credentials = authority.credentials("shop.example")
    context = ssl.create_default_context(cafile=str(authority.path))
    for name, seeds in ((first, [second]), (second, [first, fake.address])):
        lab.launch(cluster, name, seeds=seeds).context = context
    rings_are(cluster, cluster.names, cluster.names, 5.0)
    # It may be dialled; without a node's certificate it must not be spoken to.
    _check_stranger(lab, cluster, fake, cluster.names)


def _credentials(certificate: str, lab: Lab, authority: Authority) -> grpc.ServerCredentials | None:
    if certificate == "none":
        return None
    if certificate == "another authority":
        authority = Authority(lab.scratch / "another")
    name = {
        "another authority": _NODE_NAME,
        "a client's name": "shop.example",
        "a name that looks like a node's": "x.node.nodes.example",
    }[certificate]
    directory = authority.issue("127.0.0.1", name, at="impostor")
    pair = ((directory / "key.pem").read_bytes(), (directory / "crt.pem").read_bytes())
    return grpc.ssl_server_credentials([pair])


for _certificate in _CERTIFICATES:
    attack(_KIND, f"at a seed's address, with TLS, its certificate: {_certificate}")(
        partial(_by_certificate, _certificate)
    )
