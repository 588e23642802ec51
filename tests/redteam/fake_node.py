"""A node that has no secret: it answers every call of the Peer service, and keeps all that it is sent.

It reads requests as far as it can and answers what would suit it best, so that it does not depend on how the
calls are signed. What it puts where a proof belongs is its Proof:

    none        nothing
    other       a signature and a MAC with a secret of its own
    echo        the caller's own signature and seal, in all places where a proof may be
    wrapped     the same, with the answers of a batch as one field, as the batch is in a request
    mirror      the request's own bytes as the answer, with the caller's metadata
    recorded    what an honest node has answered to the same method before, with its metadata
    relay       what an honest node answers to this very request, with its metadata
    reflected   the same, with the asking node itself as the honest one
    altered     as relay, with this node's name in the place of the honest one, and forged answers to calls
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BoolValue
from mnemosynerpc.session_pb2 import (
    ContextResponse,
    GetRequest,
    GetResponse,
    Session,
    SetValueResponse,
    StartResponse,
)

from cluster.peerpb import peer_pb2 as pb

PROOFS: Final = (
    "none", "other", "echo", "wrapped", "mirror", "recorded", "relay", "reflected", "altered",
)  # fmt: skip
FORGED: Final = "ADMIN-forged"
SERVICE: Final = "mnemosynepeer.Peer"
_PING, _ACK, _PING_REQUEST, _GOSSIP, _SYNC, _SYNC_REPLY = 1, 2, 3, 5, 6, 7
_KEY: Final = "mnemosyned-peer"
_OWN_SECRET: Final = b"a-secret-of-the-attacker"
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Heard:
    """One message that a node has sent here."""

    method: str
    metadata: Metadata
    body: bytes


@dataclass
class FakeNode:
    """A gRPC server without the secret, from `start` to `stop`."""

    port: int
    proof: str = "none"
    name: str = ""  # of which node it pretends to be; its own address if not said
    honest: str = ""  # the address of a node to relay to, or to record
    table: Sequence[pb.Update] = ()  # told in each SYNC_REPLY
    credentials: grpc.ServerCredentials | None = None  # for TLS
    heard: list[Heard] = field(default_factory=list)
    _recorded: dict[str, tuple[Metadata, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = f"127.0.0.1:{self.port}"
        self.name = self.name or self.address
        self.generation = time.time_ns() // 1_000_000
        self._server = grpc.server(ThreadPoolExecutor(64), options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((_AnyMethod(self),))
        self._channel = grpc.insecure_channel(self.honest) if self.honest else None

    def start(self, within_s: float = 5.0) -> Self:
        """Listen; the port of a node that was just killed may take a moment."""
        end_s = time.monotonic() + within_s
        while True:
            try:
                if self.credentials is None:
                    self._server.add_insecure_port(self.address)
                else:
                    self._server.add_secure_port(self.address, self.credentials)
            except RuntimeError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.02)
            else:
                break
        self._server.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
        if self._channel is not None:
            self._channel.close()

    @property
    def all_bytes(self) -> bytes:
        """All that nodes have sent here: bodies and metadata."""
        parts = [one.body for one in self.heard]
        for one in self.heard:
            parts += [value if isinstance(value, bytes) else value.encode() for _, value in one.metadata]
        return b"\n".join(parts)

    def origin(self) -> pb.Origin | None:
        """Return the origin that a node's gossip carries: label and fingerprint of its cluster."""
        for one in self.heard:
            if one.method == "Gossip":
                with suppress(DecodeError):
                    return pb.GossipRequest.FromString(one.body).origin
        return None

    def claim(self) -> pb.Member:
        """Return what this node says of itself."""
        return pb.Member(
            name=self.name,
            address="" if self.name == self.address else self.address,
            generation=self.generation,
            incarnation=1,
            phase=1,
            instance=77,
        )

    def replies(
        self,
        method: str,
        metadata: Metadata,
        messages: Iterable[bytes],
        context: Any,  # noqa: ANN401  # a ServicerContext
    ) -> Iterator[bytes]:
        """Answer one call of any kind."""
        is_first = True
        for body in messages:
            self.heard.append(Heard(method, metadata, body))
            proof, reply = self._reply(method, metadata, body)
            if is_first:
                # In both places: which one a node reads is its own affair.
                if proof:
                    context.send_initial_metadata(proof)
                    context.set_trailing_metadata(proof)
                is_first = False
            yield reply

    def _reply(self, method: str, metadata: Metadata, body: bytes) -> tuple[Metadata, bytes]:
        if self.proof == "mirror":
            return _own(metadata), body
        if self.proof == "recorded" and method in self._recorded:
            return self._recorded[method]
        if self.proof in ("recorded", "relay", "reflected", "altered"):
            relayed = self._relay(method, metadata, body)
            if relayed is not None:
                self._recorded.setdefault(method, relayed)
                if self.proof == "altered":
                    return relayed[0], self._altered(method, body, relayed[1])
                return relayed
        echoes = self.proof in ("echo", "wrapped")
        forged = self._forged(method, body, _seal_of(body) if echoes else b"\x07" * 32)
        if self.proof == "other":
            return _signed(method, forged), forged
        return (_own(metadata) if echoes else ()), forged

    def _relay(self, method: str, metadata: Metadata, body: bytes) -> tuple[Metadata, bytes] | None:
        if self._channel is None or method == "Forward":
            # A stream cannot be relayed one message at a time; its answers are forged.
            return None
        relayed = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            body, call = relayed.with_call(body, timeout=2, metadata=_own(metadata))
        except grpc.RpcError:
            return None
        return (*_own(call.initial_metadata()), *_own(call.trailing_metadata())), body

    def _altered(self, method: str, request: bytes, answer: bytes) -> bytes:
        if method == "Gossip":
            response = pb.GossipResponse.FromString(answer)
            if response.HasField("packet"):
                response.packet.sender.CopyFrom(self.claim())
                return response.SerializeToString()
        return answer.replace(self.honest.encode(), self.name.encode()) or self._forged(method, request, b"")

    def _forged(self, method: str, body: bytes, seal: bytes) -> bytes:
        if method == "Gossip":
            return self._forged_gossip(body)
        if method == "Forward":
            return _forged_forward(body, seal, is_wrapped=self.proof == "wrapped")
        return b"" if method in ("Invalidate", "Leave") else body

    def _forged_gossip(self, body: bytes) -> bytes:
        try:
            request = pb.GossipRequest.FromString(body).packet
        except DecodeError:
            return b""
        kind = {_PING: _ACK, _PING_REQUEST: _ACK, _SYNC: _SYNC_REPLY}.get(request.kind)
        if kind is None:
            return b""
        packet = pb.Packet(kind=kind, sender=self.claim(), sequence=request.sequence)
        packet.target = request.sender.name
        packet.updates.add(member=self.claim())
        if kind == _SYNC_REPLY:
            packet.table.add(member=self.claim())
            packet.table.extend(self.table)
        return pb.GossipResponse(packet=packet).SerializeToString()


class _AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = details.method.rpartition("/")[2]
        metadata = tuple((str(key), value) for key, value in details.invocation_metadata)

        def reply(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401  # a ServicerContext
            return self._node.replies(method, metadata, messages, context)

        # On the wire, a call with one message and one answer is such a stream too.
        return grpc.stream_stream_rpc_method_handler(reply)


def _own(metadata: Metadata) -> Metadata:
    """Return the metadata that nodes add to their calls themselves."""
    return tuple((key, value) for key, value in metadata if key.startswith("mnemosyne"))


def _signed(method: str, body: bytes) -> Metadata:
    now_ms, nonce = time.time_ns() // 1_000_000, "00" * 12
    text = "".join(f"{word}\n" for word in ("v1", method, now_ms, nonce)).encode()
    mac = hmac.new(_OWN_SECRET, text + body, hashlib.sha256).hexdigest()
    return ((_KEY, f"v1 {now_ms} {nonce} {mac}"),)


def _seal_of(body: bytes) -> bytes:
    with suppress(DecodeError):
        return pb.ForwardRequest.FromString(body).seal
    return b""


def _forged_forward(body: bytes, seal: bytes, *, is_wrapped: bool) -> bytes:
    """Return answers in which every session is that of ADMIN."""
    items: Sequence[pb.Item] = ()
    with suppress(DecodeError):
        items = pb.Batch.FromString(pb.ForwardRequest.FromString(body).batch).items
    answers = b"".join(_field(1, _answer(item)) for item in items)
    return (_field(1, answers) if is_wrapped else answers) + (_field(2, seal) if seal else b"")


def _answer(item: pb.Item) -> bytes:
    return _field(2, _forged_message(item))


def _forged_message(item: pb.Item) -> bytes:
    token = ""
    with suppress(DecodeError):
        token = GetRequest.FromString(item.message).access_token
    session = Session(access_token=token or "f" * 128, subject_id=FORGED, bag={"role": "admin"})
    if item.method == "Get":
        return GetResponse(session=session).SerializeToString()
    if item.method == "Context":
        return ContextResponse(session=session).SerializeToString()
    if item.method in ("Start", "Create"):
        return StartResponse(session=session).SerializeToString()
    if item.method in ("SetValue", "SetData"):
        return SetValueResponse(bag={"role": "admin"}).SerializeToString()
    return BoolValue(value=True).SerializeToString()


def _field(number: int, payload: bytes) -> bytes:
    head, size = bytes((number << 3 | 2,)), len(payload)
    digits = b""
    while size > 127:
        digits, size = digits + bytes((size & 127 | 128,)), size >> 7
    return head + digits + bytes((size,)) + payload
