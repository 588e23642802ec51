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
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
MEMBERS = st.builds(
    Member,
    name=NAMES,
    address=st.sampled_from(["10.0.0.1:8080", "[2001:db8::1]:1", "a.b:65535"]),
    generation=NUMBERS,
    incarnation=NUMBERS,
    state=st.sampled_from(State),
    phase=st.sampled_from(Phase),
    instance=st.integers(0, 2**63 - 1),
)
UPDATES = st.lists(st.builds(Update, MEMBERS, NAMES, st.booleans()), max_size=3).map(tuple)
HASHES = st.integers(0, 2**64 - 1)
PACKETS = st.builds(
    Packet,
    kind=st.sampled_from(Kind),
    sender=MEMBERS,
    target=NAMES,
    sequence=NUMBERS,
    subject=NAMES,
    members_hash=HASHES,
    ring_hash=HASHES,
    updates=UPDATES,
    table=UPDATES,
)
ORIGIN = pb.Origin(cluster_label="label", storage_fingerprint=b"f", protocol=1)


@given(PACKETS)
def test_a_packet_comes_out_as_it_went_in(packet: Packet) -> None:
    assert wire.parse_request(wire.request(packet, ORIGIN)) == (ORIGIN, packet)
    assert wire.parse_response(wire.response(packet)) == (packet, "")


def test_an_answer_may_be_none_or_a_refusal() -> None:
    assert wire.parse_response(wire.response(None)) == (None, "")
    assert wire.parse_response(wire.response(None, "another label")) == (None, "another label")


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
        ("sender__name", "", "without a name"),
        ("sender__name", "x" * 301, "endless"),
        ("sender__address", "x" * 301, "endless"),
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


def test_a_table_beyond_all_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MEMBERS", 1)
    update = pb.Update(member=pb.Member(name="a:1"))
    packet = pb.Packet(kind=1, sender=pb.Member(name="a:1"), table=[update, update])

    with pytest.raises(MalformedPacket, match="more than 1 members"):
        wire.parse_request(pb.GossipRequest(packet=packet).SerializeToString())


def test_answers_are_as_many_as_the_items() -> None:
    body = pb.Answers(answers=[pb.Answer(text="a"), pb.Answer(text="b")]).SerializeToString()

    assert [answer.text for answer in wire.parse_answers(body, 2)] == ["a", "b"]
    with pytest.raises(MalformedPacket, match="2 answers to 3 items"):
        wire.parse_answers(body, 3)
    with pytest.raises(MalformedPacket, match="Answers"):
        wire.parse_answers(b"\xff\xff", 1)
