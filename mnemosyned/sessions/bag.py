"""The stored form of a session's bag.

What this daemon writes is the protobuf encoding of a `Session` that has only `bag` set:
empty, or starting with the tag 0x22, ready to be spliced into a response. Rows of the Go
daemon hold the gob encoding of `type Bag map[string]string`, which starts with 0x12.
gob: https://pkg.go.dev/encoding/gob; the constants are those of Go's own encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from mnemosynerpc.session_pb2 import Session

from mnemosyned.errors import CorruptBag, InvalidArgument
from mnemosyned.sessions.model import MAX_BAG_BYTES

_GOB_TYPE: Final = bytes.fromhex("127f0401010342616701ff8000010c010c0000")
_GOB_VALUE_TYPE_ID: Final = b"\xff\x80"
_GOB_ONE_BYTE_LIMIT: Final = 0x80
_GOB_MAX_UINT_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BagLimits:
    """What callers may put into one bag. What was stored before is read, and changed, as it is."""

    entries: int = 10_000
    key_bytes: int = 64 * 1024
    value_bytes: int = MAX_BAG_BYTES

    def checked(self, values: Mapping[str, str]) -> Mapping[str, str]:
        """Return the values of a new bag if they are within the limits.

        Raises:
            InvalidArgument: they are not.
        """
        if len(values) > self.entries:
            raise too_many_entries(self.entries)
        for key, value in values.items():
            self.check(key, value)
        return values

    def check(self, key: str, value: str) -> None:
        """Raise InvalidArgument if the key or the value is too long."""
        _check_length("key", key, self.key_bytes)
        _check_length("value", value, self.value_bytes)


def too_many_entries(limit: int) -> InvalidArgument:
    """Return the error for a bag with more entries than that."""
    return InvalidArgument(f"mnemosyned: bag would have more than {limit} entries")


def _check_length(what: str, text: str, max_bytes: int) -> None:
    # A character takes four bytes at most, so that short texts need no encoding.
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        raise InvalidArgument(f"mnemosyned: bag {what} is longer than {max_bytes} bytes")


def encode(bag: Mapping[str, str]) -> bytes:
    """Return the stored form; equal bags give equal bytes."""
    return Session(bag=bag).SerializeToString(deterministic=True)


def decode(stored: bytes) -> dict[str, str]:
    """Read either stored form.

    Raises:
        CorruptBag: the bytes are neither of the two forms.
    """
    if is_gob(stored):
        return _GobReader(stored).bag()
    try:
        return dict(Session.FromString(stored).bag)
    except DecodeError:
        raise CorruptBag("mnemosyned: storage: a bag is neither gob nor protobuf") from None


def with_value(stored: bytes, key: str, value: str, *, max_entries: int) -> tuple[dict[str, str], bytes]:
    """Set one key; return the new bag and its stored form.

    Raises:
        InvalidArgument: the new stored form would be over MAX_BAG_BYTES, or the key one too many.
        CorruptBag: see `decode`.
    """
    values = decode(stored)
    if len(values) >= max_entries and key not in values:
        raise too_many_entries(max_entries)
    values[key] = value
    return values, check_size(encode(values))


def check_size(stored: bytes) -> bytes:
    """Return the stored form if it is within MAX_BAG_BYTES.

    Raises:
        InvalidArgument: it is not.
    """
    if len(stored) > MAX_BAG_BYTES:
        raise InvalidArgument(f"mnemosyned: bag is longer than {MAX_BAG_BYTES} bytes")
    return stored


def is_gob(stored: bytes) -> bool:
    """Tell whether the Go daemon wrote these bytes."""
    return stored.startswith(_GOB_TYPE[:1])


def as_session_fields(stored: bytes) -> bytes:
    """Return the bag as encoded fields of a `Session`; our own form is returned as it is."""
    return encode(decode(stored)) if is_gob(stored) else stored


class _GobReader:
    """A cursor over one gob stream that holds one Bag."""

    def __init__(self, stored: bytes) -> None:
        self._stored = stored
        self._at = 0

    def bag(self) -> dict[str, str]:
        try:
            self._expect(_GOB_TYPE)
            if self._uint() != len(self._stored) - self._at:
                raise CorruptBag("mnemosyned: storage: a gob bag is cut short or has bytes left over")
            # A value that is not a struct is preceded by a zero field delta.
            self._expect(_GOB_VALUE_TYPE_ID + b"\0")
            pairs = [(self._text(), self._text()) for _ in range(self._bounded_count())]
        except (IndexError, UnicodeDecodeError) as exc:
            raise CorruptBag("mnemosyned: storage: a gob bag is damaged") from exc
        if self._at != len(self._stored):
            raise CorruptBag("mnemosyned: storage: a gob bag has bytes left over")
        return dict(pairs)

    def _expect(self, expected: bytes) -> None:
        if self._take(len(expected)) != expected:
            raise CorruptBag("mnemosyned: storage: a gob value is not a Bag")

    def _bounded_count(self) -> int:
        count = self._uint()
        # A pair takes two bytes at least: a forged count must not cost memory.
        if count * 2 > len(self._stored) - self._at:
            raise CorruptBag("mnemosyned: storage: a gob bag is cut short")
        return count

    def _text(self) -> str:
        return self._take(self._uint()).decode()

    def _uint(self) -> int:
        first = self._take(1)[0]
        if first < _GOB_ONE_BYTE_LIMIT:
            return first
        size = 0x100 - first
        if size > _GOB_MAX_UINT_BYTES:
            raise CorruptBag("mnemosyned: storage: a gob number is too long")
        return int.from_bytes(self._take(size), "big")

    def _take(self, size: int) -> bytes:
        taken = self._stored[self._at : self._at + size]
        if len(taken) != size:
            raise IndexError(self._at)
        self._at += size
        return taken
