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

from cluster.addresses import MAX_NAME, is_address
from cluster.errors import MalformedPacket
from cluster.member import Kind, Member, Packet, Phase, State, Update
from cluster.peerpb import peer_pb2 as pb

AnyMessage = TypeVar("AnyMessage", bound=Message)
# More than a node sends along (swim.py, MAX_UPDATES).
_MAX_UPDATES: Final = 64
# Far beyond any clock and any count of refutations; above it arithmetic would leave 64 bits.
MAX_NUMBER: Final = 2**62
# Of one Update: two names, a public address, an accuser, and numbers.
_UPDATE_BYTES: Final = 4 * MAX_NAME + 64

RawTable = Sequence[pb.Update]


def request(packet: Packet, origin: pb.Origin) -> bytes:
    """Return a packet as a GossipRequest."""
    return pb.GossipRequest(origin=origin, packet=_message(packet)).SerializeToString()


def response(packet: Packet | None, refusal: str = "") -> bytes:
    """Return an answer as a GossipResponse; `None` where the packet asked for no answer."""
    message = pb.GossipResponse(refusal=refusal)
    if packet is not None:
        message.packet.CopyFrom(_message(packet))
    return message.SerializeToString()


def max_request_bytes(max_members: int) -> int:
    """Return the size of the longest GossipRequest in a cluster of so many members."""
    return (max_members + _MAX_UPDATES) * _UPDATE_BYTES + 4096


def parse_request(body: bytes) -> tuple[pb.Origin, Packet, RawTable]:
    """Return what a GossipRequest holds; its table is not in the packet, but apart for `updates`.

    Raises:
        MalformedPacket: it is none.
    """
    message = parsed(pb.GossipRequest, body)
    return message.origin, _packet(message.packet), message.packet.table


def parse_response(body: bytes) -> tuple[Packet | None, RawTable, str]:
    """Return a GossipResponse's packet, its table apart, and the refusal. Raises MalformedPacket."""
    message = parsed(pb.GossipResponse, body)
    packet = _packet(message.packet) if message.HasField("packet") else None
    return packet, message.packet.table, message.refusal


def updates(table: RawTable, start: int, stop: int) -> tuple[Update, ...]:
    """Return a part of a table. Raises MalformedPacket."""
    return tuple(map(_update, table[start:stop]))


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
        public=member.public,
    )


def _packet(message: pb.Packet) -> Packet:
    if len(message.updates) > _MAX_UPDATES:
        raise MalformedPacket(f"a packet with more than {_MAX_UPDATES} updates")
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
    )


def _update(message: pb.Update) -> Update:
    if message.accuser and not is_address(message.accuser):
        raise MalformedPacket("an accuser whose name is not host:port")
    return Update(_member(message.member), message.accuser, message.is_refused)


def _member(message: pb.Member) -> Member:
    """Return a member, if its name and address can be dialled, and its numbers leave room to refute."""
    address = message.address or message.name
    if not is_address(message.name) or not is_address(address):
        raise MalformedPacket("a member with a name or an address that is not host:port")
    if message.public and not is_address(message.public):
        raise MalformedPacket("a member whose public address is not host:port")
    # A refutation adds 1. Without a bound one packet could take the last number, and end all refutations.
    if max(message.generation, message.incarnation) >= MAX_NUMBER:
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
        public=message.public,
    )
