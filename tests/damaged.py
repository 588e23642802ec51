"""Bags that no daemon wrote, by what is wrong with them."""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import Session

FORGED: Final = "ADMIN"
_BAG: Final = Session(bag={"k": "v"}).SerializeToString()
_GOB: Final = bytes.fromhex("127f0401010342616701ff8000010c010c0000")


def _with(**fields: object) -> bytes:
    return _BAG + Session(**fields).SerializeToString()  # type: ignore[arg-type]  # a Session's fields


BAGS: Final[dict[str, bytes]] = {
    "another subject": _with(subject_id=FORGED),
    "another subject first": Session(subject_id=FORGED).SerializeToString() + _BAG,
    "another client": _with(subject_client=FORGED),
    "another token": _with(access_token=FORGED),
    "another refresh token": _with(refresh_token=FORGED),
    "another expiry": _with(expire_at=Timestamp(seconds=4_000_000_000)),
    "an empty expiry": _BAG + b"\x2a\x00",
    "a subject with its number in three bytes": _BAG + b"\x92\x80\x00\x05ADMIN",
    "an unknown field": _BAG + b"\x7a\x05ADMIN",
    "an unknown number": _BAG + b"\x78\x00",
    "a group": _BAG + b"\x13\x12\x05ADMIN\x14",
    "a bag of another wire type": b"\x20\x01",
    "a truncated entry": _BAG[:-1],
    "a tag alone": b"\x22",
    "an entry longer than the row": b"\x22\xff\xff\xff\x7f" + _BAG,
    "an entry that reaches into the next": b"\x22\x0e\x0a\x01k\x12\x01v" + b"\x22\x06\x0a\x01l\x12\x01v",
    "an entry without a value": b"\x22\x03\x0a\x01k",
    "an entry without a key": b"\x22\x03\x12\x01v",
    "an empty entry": b"\x22\x00",
    "an entry with its value first": b"\x22\x06\x12\x01v\x0a\x01k",
    "an entry with two keys": b"\x22\x09\x0a\x01j\x0a\x01k\x12\x01v",
    "an entry with a third field": b"\x22\x0c\x0a\x01k\x12\x01v\x1a\x04evil",
    "an entry with a number for a key": b"\x22\x05\x08\x01\x12\x01v",
    "a tag in two bytes": b"\xa2\x00\x06\x0a\x01k\x12\x01v",
    "a length in two bytes": b"\x22\x86\x00\x0a\x01k\x12\x01v",
    "a key's length in two bytes": b"\x22\x07\x0a\x81\x00k\x12\x01v",
    "two oddities of opposite size": b"\x22\x84\x80\x00\x0a\x00\x12\x00",
    "a key twice": _BAG + _BAG,
    "a key twice with another value": _BAG + b"\x22\x06\x0a\x01k\x12\x01w",
    "a key that is not UTF-8": b"\x22\x06\x0a\x01\xff\x12\x01v",
    "a value that is not UTF-8": b"\x22\x06\x0a\x01k\x12\x01\xff",
    "a value with half a pair of surrogates": b"\x22\x08\x0a\x01k\x12\x03\xed\xa0\x80",
    "an endless number": b"\x22" + b"\xff" * 20,
    "number 0": b"\x02\x05ADMIN",
    "zeros": bytes(100),
    "text": b"{}",
    "too many entries": Session(bag={str(n): "" for n in range(10_001)}).SerializeToString(),
    "one entry many times": b"\x22\x04\x0a\x00\x12\x00" * 600_000,
    "a long key": Session(bag={"k" * 65_537: ""}).SerializeToString(),
    "a bag over the limit": Session(bag={"k": "x" * 4_000_000}).SerializeToString(),
    "half a gob": _GOB[:-5],
    "a gob with noise": _GOB + b"\xff\xff\xff\xff",
    "a gob with a key twice": _GOB + bytes.fromhex("0cff8000020161013101610132"),
    "a gob with many entries": _GOB + bytes.fromhex("fd009c45ff8000fe2711") + b"\0\0" * 20_001,
}
