from __future__ import annotations

from random import Random

import pytest
from mnemosynerpc.session_pb2 import Session

from mnemosyned.sessions import bag, many_bags

BAGS = [
    b"",
    bag.encode({"k": "v"}),
    bag.encode({"": ""}),
    bag.encode({"name": "Ada", "theme": "dark", "zażółć": "日本語"}),
    bag.encode({"k": "x" * 300}),
    bag.encode({str(number): "v" for number in range(100)}),
]
GOOD = BAGS[1]
BAD = {
    "gob": bytes.fromhex("127f0401010342616701ff8000010c010c000008ff800001016b0176"),
    "too long for the quick answer": bag.encode({"k": "x" * 4096}),
    "another field in front": b"\x1a\x03web" + GOOD,
    "another field behind": GOOD + b"\x32\x01r",
    "an expiry behind": GOOD + b"\x2a\x00",
    "an unknown field": GOOD + b"\x3a\x01x",
    "an unknown field in an entry": b"\x22\x09\x0a\x01k\x12\x01v\x1a\x01x",
    "a key twice": GOOD + GOOD,
    "keys in another sequence": bag.encode({"z": "1"}) + bag.encode({"a": "1"}),
    "a needless byte": b"\x22\x87\x00\x0a\x01k\x12\x01v" + b"x",
    "cut short": GOOD[:-1],
    "longer than itself": b"\x22\x0f\x0a\x01k\x12\x0a" + b"v",
    "no UTF-8": b"\x22\x06\x0a\x01k\x12\x01\xff",
    "a missing value": b"\x22\x03\x0a\x01k",
    "an entry that is no message": b"\x20\x01",
}


def test_bags_that_the_daemon_writes_are_ordinary() -> None:
    assert many_bags.are_ordinary([])
    assert many_bags.are_ordinary(BAGS)
    assert all(map(bag.is_ordinary, BAGS))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("at", [0, 3, 6])
def test_one_bag_that_is_not_ordinary_is_met_wherever_it_is(name: str, at: int) -> None:
    assert not bag.is_ordinary(BAD[name])
    assert not many_bags.are_ordinary([*BAGS[:at], BAD[name], *BAGS[at:]])


@pytest.mark.fuzz
def test_many_bags_are_ordinary_if_each_is() -> None:
    random = Random(11)  # no secret
    pieces = [*BAGS[:4], *BAD.values(), b"\x22", b"\x0a", b"\x12", b"\x00", b"\x01"]
    for _ in range(3000):
        made = [b"".join(random.choices(pieces, k=random.randint(0, 3))) for _ in range(random.randint(1, 3))]
        if random.random() < 0.5 and made[0]:
            at = random.randrange(len(made[0]))
            made[0] = made[0][:at] + random.randbytes(1) + made[0][at + 1 :]
        assert many_bags.are_ordinary(made) == all(map(bag.is_ordinary, made)), made


def test_the_message_of_bags_has_the_field_of_a_session() -> None:
    field = Session.DESCRIPTOR.fields_by_name["bag"]
    own = many_bags._Bags.DESCRIPTOR.fields_by_name["bags"].message_type.fields_by_name["bag"]

    assert (own.number, own.type) == (field.number, field.type)
    for name in ("key", "value"):
        wanted = field.message_type.fields_by_name[name]
        found = own.message_type.fields_by_name[name]
        assert (found.number, found.type) == (wanted.number, wanted.type)
