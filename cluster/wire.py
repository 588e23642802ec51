"""Packets as protobuf, and back: what comes in is checked here, once.

Every value that the core of membership sees has passed `_member`, `_update` or `_packet`. Those refuse what
would make the core raise, or keep numbers that protobuf cannot carry any more. Unknown fields are ignored, as
protobuf does, so that a later release may add some.

A rolling upgrade has nodes of two releases in one cluster. Therefore a field that is empty must mean what it
meant before there was such a field: an empty address is the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from cluster.errors import MalformedPacket
from cluster.member import Kind, Member, Packet, Phase, State, Update
from cluster.peerpb import peer_pb2 as pb
from cluster.table import MAX_MEMBERS

AnyMessage = TypeVar("AnyMessage", bound=Message)
_MAX_PORT: Final = 65_535
_MAX_NAME: Final = 300  # of a host name, 253, and a port
# Far beyond any clock and any count of refutations; above it arithmetic would leave 64 bits.
_MAX_NUMBER: Final = 2**62


def request(packet: Packet, origin: pb.Origin) -> bytes:
    """Return a packet as a GossipRequest."""
    return pb.GossipRequest(origin=origin, packet=_message(packet)).SerializeToString()


def response(packet: Packet | None, refusal: str = "") -> bytes:
    """Return an answer as a GossipResponse; `None` where the packet asked for no answer."""
    message = pb.GossipResponse(refusal=refusal)
    if packet is not None:
        message.packet.CopyFrom(_message(packet))
    return message.SerializeToString()


def parse_request(body: bytes) -> tuple[pb.Origin, Packet]:
    """Return what a GossipRequest holds. Raises MalformedPacket."""
    message = parsed(pb.GossipRequest, body)
    return message.origin, _packet(message.packet)


def parse_response(body: bytes) -> tuple[Packet | None, str]:
    """Return a GossipResponse's packet and refusal. Raises MalformedPacket."""
    message = parsed(pb.GossipResponse, body)
    packet = _packet(message.packet) if message.HasField("packet") else None
    return packet, message.refusal


def parse_answers(body: bytes, count: int) -> Sequence[pb.Answer]:
    """Return the answers to that many items. Raises MalformedPacket."""
    response = parsed(pb.Answers, body)
    if len(response.answers) != count:
        # Answers belong to items by their place alone, so each of these might be for another call.
        raise MalformedPacket(f"{len(response.answers)} answers to {count} items")
    return response.answers


def parsed(kind: type[AnyMessage], body: bytes) -> AnyMessage:
    """Return a message of this kind. Raises MalformedPacket."""
    try:
        return kind.FromString(body)
    except DecodeError:
        # Without protobuf's own text, which may quote the message.
        raise MalformedPacket(f"not a valid {kind.DESCRIPTOR.full_name}") from None


def _message(packet: Packet) -> pb.Packet:
    return pb.Packet(
        kind=int(packet.kind),
        sender=_member_message(packet.sender),
        target=packet.target,
        sequence=packet.sequence,
        subject=packet.subject,
        members_hash=packet.members_hash,
        ring_hash=packet.ring_hash,
        updates=map(_update_message, packet.updates),
        table=map(_update_message, packet.table),
    )


def _update_message(update: Update) -> pb.Update:
    return pb.Update(
        member=_member_message(update.member), accuser=update.accuser, is_refused=update.is_refused
    )


def _member_message(member: Member) -> pb.Member:
    # Where names are addresses, which is usual, the address would be half of the message.
    return pb.Member(
        name=member.name,
        address="" if member.address == member.name else member.address,
        generation=member.generation,
        incarnation=member.incarnation,
        state=int(member.state),
        phase=int(member.phase),
        instance=member.instance,
    )


def _packet(message: pb.Packet) -> Packet:
    # A table is the only part without a bound of its own: the core reads MAX_UPDATES updates and no more.
    if len(message.table) > MAX_MEMBERS:
        raise MalformedPacket(f"a table of more than {MAX_MEMBERS} members")
    try:
        kind = Kind(message.kind)
    except ValueError:
        # Of a later release, perhaps. An answer would have to know what it asks.
        raise MalformedPacket(f"a packet of unknown kind {message.kind}") from None
    return Packet(
        kind=kind,
        sender=_member(message.sender),
        target=message.target,
        sequence=message.sequence,
        subject=message.subject,
        members_hash=message.members_hash,
        ring_hash=message.ring_hash,
        updates=tuple(map(_update, message.updates)),
        table=tuple(map(_update, message.table)),
    )


def _update(message: pb.Update) -> Update:
    return Update(_member(message.member), message.accuser, message.is_refused)


def _member(message: pb.Member) -> Member:
    """Return a member, if its name and address can be dialled and its numbers leave room to refute."""
    address = message.address or message.name
    if not 0 < len(message.name) <= _MAX_NAME or len(address) > _MAX_NAME:
        raise MalformedPacket("a member without a name, or with an endless one")
    if not _is_address(address):
        raise MalformedPacket("a member with an address that is not host:port")
    # A refutation adds 1. Without a bound one packet could take the last number, and end all refutations.
    if max(message.generation, message.incarnation) >= _MAX_NUMBER:
        raise MalformedPacket("a member whose generation or incarnation is out of bounds")
    try:
        state, phase = State(message.state), Phase(message.phase)
    except ValueError:
        raise MalformedPacket("a member in an unknown state") from None
    return Member(
        name=message.name,
        address=address,
        generation=message.generation,
        incarnation=message.incarnation,
        state=state,
        phase=phase,
        instance=message.instance,
    )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT
