from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster import wire
from cluster.errors import MalformedPacket
from cluster.member import Kind, Member, Packet, Phase, State, Update
from cluster.peerpb import peer_pb2 as pb

NUMBERS = st.integers(0, 2**62 - 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
NAMES = st.from_regex(r"[a-z0-9._-]{1,60}:[1-9][0-9]{0,3}", fullmatch=True).filter(
    lambda name: name[0] not in ".-"
)
MEMBERS = st.builds(
    Member,
    name=NAMES,
    address=st.sampled_from(["10.0.0.1:8080", "[2001:db8::1]:1", "a.b:65535"]),
    generation=NUMBERS,
    incarnation=NUMBERS,
    state=st.sampled_from(State),
    phase=st.sampled_from(Phase),
    instance=st.integers(0, 2**63 - 1),
    public=st.one_of(st.just(""), NAMES),
)
UPDATES = st.lists(st.builds(Update, MEMBERS, NAMES, st.booleans()), max_size=3).map(tuple)
HASHES = st.integers(0, 2**64 - 1)
PACKETS = st.builds(
    Packet,
    kind=st.sampled_from(Kind),
    sender=MEMBERS,
    target=TEXTS,
    sequence=NUMBERS,
    subject=TEXTS,
    members_hash=HASHES,
    ring_hash=HASHES,
    updates=UPDATES,
    table=UPDATES,
)
ORIGIN = pb.Origin(cluster_label="label", storage_fingerprint=b"f", protocol=1)


@given(PACKETS)
def test_a_packet_comes_out_as_it_went_in(packet: Packet) -> None:
    origin, request, table = wire.parse_request(wire.request(packet, ORIGIN))
    response, response_table, refusal = wire.parse_response(wire.response(packet))

    assert (origin, refusal) == (ORIGIN, "")
    assert request == response == packet._replace(table=())
    assert wire.updates(table, 0, 99) == wire.updates(response_table, 0, 99) == packet.table
    assert wire.updates(table, 1, 2) == packet.table[1:2]


def test_an_answer_may_be_none_or_a_refusal() -> None:
    for refusal in ("", "another label"):
        packet, table, found = wire.parse_response(wire.response(None, refusal))
        assert (packet, list(table), found) == (None, [], refusal)


@pytest.mark.fuzz
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_a_packet_or_malformed(body: bytes) -> None:
    for parse in (wire.parse_request, wire.parse_response):
        with suppress(MalformedPacket):
            parse(body)


def damaged(**fields: object) -> bytes:
    message = pb.Packet(kind=1, sender=pb.Member(name="a:1"))
    for path, value in fields.items():
        *parents, name = path.split("__")
        part: object = message
        for parent in parents:
            part = getattr(part, parent)
        setattr(part, name, value)
    return pb.GossipRequest(packet=message).SerializeToString()


def test_what_is_damaged_below_is_whole_without_damage() -> None:
    assert wire.parse_request(damaged())[1].sender.name == "a:1"


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("kind", 0, "unknown kind"),
        ("kind", 99, "unknown kind"),
        ("sender__name", "", "host:port"),
        ("sender__name", "x" * 301, "host:port"),
        ("sender__address", "x" * 301, "host:port"),
        ("sender__address", "a", "host:port"),
        ("sender__address", ":1", "host:port"),
        ("sender__address", "a:0", "host:port"),
        ("sender__address", "a:65536", "host:port"),
        ("sender__address", "a:²", "host:port"),
        ("sender__name", "no-port", "host:port"),
        ("sender__generation", 2**62, "out of bounds"),
        ("sender__incarnation", 2**62, "out of bounds"),
        ("sender__state", 4, "unknown state"),
        ("sender__phase", 3, "unknown state"),
    ],
)
def test_what_is_out_of_bounds_is_named(field: str, value: object, word: str) -> None:
    with pytest.raises(MalformedPacket, match=word):
        wire.parse_request(damaged(**{field: value}))


def test_too_many_updates_are_refused() -> None:
    update = pb.Update(member=pb.Member(name="a:1"))
    packet = pb.Packet(kind=1, sender=pb.Member(name="a:1"), updates=[update] * 65)

    with pytest.raises(MalformedPacket, match="more than 64 updates"):
        wire.parse_request(pb.GossipRequest(packet=packet).SerializeToString())


@pytest.mark.parametrize(
    "name", ["\x1b[31m:1", "a b:1", "ä:1", "a\u202e:1", "a\n:1", "a/b:1", "[::1:1", "::1:1"]
)
def test_a_name_is_printable(name: str) -> None:
    for field in ("sender__name", "sender__address"):
        with pytest.raises(MalformedPacket, match="host:port"):
            wire.parse_request(damaged(**{field: name}))
    accused = pb.Packet(
        kind=1, sender=pb.Member(name="a:1"), updates=[pb.Update(member=pb.Member(name="b:1"), accuser=name)]
    )
    with pytest.raises(MalformedPacket, match="accuser"):
        wire.parse_request(pb.GossipRequest(packet=accused).SerializeToString())


def test_the_longest_table_fits_into_a_request() -> None:
    name = f"{'n' * 253}:65535"
    longest = Member(name, name[1:] + "5", 2**62 - 1, 2**62 - 1, State.LEFT, Phase.LEAVING, 2**63 - 1, name)
    packet = Packet(Kind.SYNC, longest, table=(Update(longest, name, is_refused=True),) * 100)

    assert len(wire.request(packet, ORIGIN)) <= wire.max_request_bytes(100)


def test_answers_are_as_many_as_the_items() -> None:
    body = pb.Answers(answers=[pb.Answer(text="a"), pb.Answer(text="b")]).SerializeToString()

    assert [answer.text for answer in wire.parse_answers(body, 2)] == ["a", "b"]
    with pytest.raises(MalformedPacket, match="2 answers to 3 items"):
        wire.parse_answers(body, 3)
    with pytest.raises(MalformedPacket, match="Answers"):
        wire.parse_answers(b"\xff\xff", 1)
