"""Many expiries, such as those of a page of List, encoded at once. Pure.

A varint has seven bits of its value in a byte. In Python that is a dozen operations for each number. Here all
numbers stand in one integer, each in a lane of eight bytes. Bits 7k to 7k + 6 of every lane move up by k, in
one operation for all lanes:

    value      … gggggggfffffffeeeeeeeddddddd
    digits     0ggggggg 0fffffff 0eeeeeee 0ddddddd

An expiry has two lanes, one for its seconds and one for its nanoseconds. What all fields have in common is a
constant of that form, with zeros where the digits are:

    bytes      0   1     2    3  4  5  6  7   8   9  10 11 12 13
    constant   tag size  tag  80 80 80 80 00  tag 80 80 80 80 00
    digits                    d  e  f  g  h       d  e  f  g  h

Nanoseconds take five bytes, or four if they are below 0.27 s. The few others are encoded one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from aio.steps import STEP_ITEMS
from aio.units import NS_PER_US, US_PER_S
from mnemosyned.sessions.encoded import EXPIRE_AT_TAG, NANOS_TAG, SECONDS_TAG, ExpiryField, varint

_LANE_BYTES: Final = 8
_FIELD_LANES_BYTES: Final = 2 * _LANE_BYTES
_SEVEN_BITS: Final = [
    int.from_bytes((0x7F << 7 * at).to_bytes(_LANE_BYTES, "little") * (2 * STEP_ITEMS), "little")
    for at in range(5)
]
_SECONDS_LANES: Final = int.from_bytes(
    (b"\xff" * _LANE_BYTES).ljust(_FIELD_LANES_BYTES, b"\0") * STEP_ITEMS, "little"
)
# How far the digits stand from the beginning of their lane.
_SECONDS_SHIFT, _NANOS_SHIFT = 3 * 8, 1 * 8
# The seconds with five digits: from 1978 on, until 3058.
_LEAST_SECONDS, _END_SECONDS = 1 << 28, 1 << 35
# From here on, nanoseconds have so many digits.
_FIVE_DIGITS_US, _FOUR_DIGITS_US = (1 << 28) // NS_PER_US + 1, (1 << 21) // NS_PER_US + 1
# Fewer expiries are encoded sooner one by one.
_FEW: Final = 16


def expiry_fields(expiries_us: Sequence[int]) -> list[bytes]:
    """Encode `expire_at` as a field of a Session for each of at most STEP_ITEMS expiries."""
    encode = ExpiryField().encode
    seconds = [us // US_PER_S for us in expiries_us]
    if len(seconds) < _FEW or min(seconds) < _LEAST_SECONDS or max(seconds) >= _END_SECONDS:
        return list(map(encode, expiries_us))
    micros = [us % US_PER_S for us in expiries_us]
    digits = _digits(seconds, micros)
    return [
        five if micro >= _FIVE_DIGITS_US else four if micro >= _FOUR_DIGITS_US else encode(us)
        # There are fields for all lanes, and not all are used.
        for us, micro, four, five in zip(
            expiries_us, micros, _WITH_FOUR.fields(digits), _WITH_FIVE.fields(digits), strict=False
        )
    ]


def _digits(seconds: Sequence[int], micros: Sequence[int]) -> int:
    """Return the digits of all seconds and nanoseconds, at their places in the fields."""
    lanes = [0] * (2 * len(seconds))
    lanes[::2], lanes[1::2] = seconds, micros
    values = int.from_bytes(Struct(f"<{len(lanes)}Q").pack(*lanes), "little")
    in_seconds = values & _SECONDS_LANES
    values = in_seconds | (values ^ in_seconds) * NS_PER_US
    digits = 0
    for at, mask in enumerate(_SEVEN_BITS):
        digits |= (values & mask) << at
    in_seconds = digits & _SECONDS_LANES
    return in_seconds << _SECONDS_SHIFT | (digits ^ in_seconds) << _NANOS_SHIFT


class _Form:
    """Fields whose nanoseconds have so many digits."""

    def __init__(self, nanos_digits: int) -> None:
        content_bytes = len(SECONDS_TAG) + 5 + len(NANOS_TAG) + nanos_digits
        head = EXPIRE_AT_TAG + varint(content_bytes) + SECONDS_TAG
        field = head + b"\x80\x80\x80\x80\0" + NANOS_TAG + b"\x80" * (nanos_digits - 1) + b"\0"
        self._common = int.from_bytes(field.ljust(_FIELD_LANES_BYTES, b"\0") * STEP_ITEMS, "little")
        self._cut = Struct(f"{len(field)}s{_FIELD_LANES_BYTES - len(field)}x" * STEP_ITEMS)

    def fields(self, digits: int) -> tuple[bytes, ...]:
        """Return the fields with these digits; those with another number of digits mean nothing."""
        return self._cut.unpack((digits | self._common).to_bytes(_FIELD_LANES_BYTES * STEP_ITEMS, "little"))


_WITH_FOUR: Final = _Form(4)
_WITH_FIVE: Final = _Form(5)
