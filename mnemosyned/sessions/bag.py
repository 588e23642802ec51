"""The stored form of a session's bag.

What this daemon writes is the protobuf encoding of a `Session` that has only `bag` set:
empty, or starting with the tag 0x22, ready to be spliced into a response. Rows of the Go
daemon hold the gob encoding of `type Bag map[string]string`, which starts with 0x12.
gob: https://pkg.go.dev/encoding/gob; the constants are those of Go's own encoder.

Stored bytes are believed only after `decode` or `checked_fields` has read them:

- A response contains them as they are. Any field that they have besides `bag` would override the session's
  own, such as its `subject_id`.
- A parser of protobuf accepts more than a daemon writes: unknown fields, keys that come twice, numbers with
  needless bytes. Clients differ in what they make of these. Here, all of them are damage.
- The reader stops at the first entry over the limits, so its time is bounded whatever the row holds.

A bag of 10,000 entries takes tens of milliseconds. Whatever reads or writes a whole bag therefore exists as
steps (aio/steps.py), which the event loop runs in slices. `decode`, `checked_fields` and `with_value` run
them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Final

from google.protobuf.message import DecodeError
from mnemosynerpc.session_pb2 import Session

from aio.steps import STEP_BYTES, STEP_ITEMS, Steps, finished
from mnemosyned.errors import CorruptSession, InvalidArgument
from mnemosyned.sessions.model import MAX_BAG_BYTES, NO_LIMIT

_ENTRY_TAG: Final = 0x22  # field 4 of Session, length-delimited
_KEY_TAG: Final = 0x0A  # field 1 of an entry, length-delimited
_VALUE_TAG: Final = 0x12  # field 2 of an entry, length-delimited
_OTHER_FIELDS: Final = tuple(field.name for field in Session.DESCRIPTOR.fields if field.name != "bag")
_VARINT_CONTINUES: Final = 0x80
# The parser of protobuf is quicker than ours, but it has no bound on the entries that it reads.
SHORT_BYTES: Final = 4096
# Enough for any length up to MAX_BAG_BYTES.
_MAX_LENGTH_BYTES: Final = 4
_GOB_TYPE: Final = bytes.fromhex("127f0401010342616701ff8000010c010c0000")
_GOB_VALUE_TYPE_ID: Final = b"\xff\x80"
_GOB_ONE_BYTE_LIMIT: Final = 0x80
_GOB_MAX_UINT_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BagLimits:
    """What callers may put into one bag; `of_stored` has the limits of what is read."""

    entries: int = 10_000
    key_bytes: int = 64 * 1024
    value_bytes: int = MAX_BAG_BYTES

    def of_stored(self) -> BagLimits:
        """Return the limits of bags in the storage: these, and at least the defaults.

        Lower flags therefore make no session unreadable that was started before, with the defaults.
        """
        return BagLimits(
            entries=max(self.entries, DEFAULT_LIMITS.entries),
            key_bytes=max(self.key_bytes, DEFAULT_LIMITS.key_bytes),
            value_bytes=max(self.value_bytes, DEFAULT_LIMITS.value_bytes),
        )

    def encoded_at_once(self, session: Session) -> bytes | None:
        """Do what `encoding` does for the bag of a message, if it is small, as nearly all are.

        Otherwise return None. Read as a mapping, entry by entry, a small bag costs three times as much.
        """
        if len(session.bag) > min(STEP_ITEMS, self.entries) or session.ByteSize() > STEP_BYTES:
            return None
        only = Session()
        only.CopyFrom(session)
        for name in _OTHER_FIELDS:
            only.ClearField(name)
        only.DiscardUnknownFields()
        stored = only.SerializeToString(deterministic=True)
        # No key and no value is longer than all of it.
        return stored if len(stored) <= min(self.key_bytes, self.value_bytes) else None

    def encoding(self, values: Mapping[str, str]) -> Steps[bytes]:
        """Return the stored form of a new bag if it is within the limits.

        Raises:
            InvalidArgument: it is not.
        """
        if len(values) > self.entries:
            raise too_many_entries(self.entries)
        for number, (key, value) in enumerate(values.items(), start=1):
            if number % STEP_ITEMS == 0 or len(value) > STEP_BYTES:
                yield
            self.check(key, value)
        return (yield from encoding(values))

    def check(self, key: str, value: str) -> None:
        """Raise InvalidArgument if the key or the value is too long."""
        _check_length("key", key, self.key_bytes)
        _check_length("value", value, self.value_bytes)


DEFAULT_LIMITS: Final = BagLimits()


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


def encoding(bag: Mapping[str, str]) -> Steps[bytes]:
    """Do what `encode` does: the entries come in the same sequence."""
    if len(bag) <= STEP_ITEMS and sum(map(len, chain(bag, bag.values()))) <= STEP_BYTES:
        return encode(bag)
    yield
    parts: list[bytes] = []
    part: dict[str, str] = {}
    size = 0
    for key in sorted(bag, key=_place):
        part[key] = bag[key]
        size += len(key) + len(part[key])
        if len(part) >= STEP_ITEMS or size > STEP_BYTES:
            yield
            parts.append(encode(part))
            part, size = {}, 0
    parts.append(encode(part))
    return b"".join(parts)


def _place(key: str) -> bytes:
    # As the library sorts: by bytes, and what begins with another key comes before that key.
    return key.encode() + b"\xff"


def decode(stored: bytes, limits: BagLimits = DEFAULT_LIMITS) -> dict[str, str]:
    """Read either stored form.

    Raises:
        CorruptSession: the bytes are neither of the two forms, or over the limits.
    """
    return finished(decoding(stored, limits))


def decoding(stored: bytes, limits: BagLimits) -> Steps[dict[str, str]]:
    """Do what `decode` does."""
    if len(stored) > MAX_BAG_BYTES:
        raise _damage(f"is longer than {MAX_BAG_BYTES} bytes")
    try:
        if is_gob(stored):
            return (yield from _GobReader(stored, limits).bag())
        return (yield from _protobuf_bag(stored, limits))
    except IndexError:
        raise _damage("is cut short") from None
    except UnicodeDecodeError:
        raise _damage("holds bytes that are not UTF-8") from None


def checked_fields(stored: bytes, limits: BagLimits = DEFAULT_LIMITS) -> bytes:
    """Return a bag from the storage as encoded fields of a `Session`.

    Our own form is returned as it is. The limits are at least the defaults (`BagLimits.of_stored`).

    Raises:
        CorruptSession: see `decode`; or the bag is within MAX_BAG_BYTES only as gob.
    """
    return finished(checking_fields(stored, limits))


def is_ordinary(stored: bytes) -> bool:
    """Tell whether a stored bag is short and what `encode` writes."""
    # No bag so short can be over limits that are at least the defaults.
    return len(stored) <= SHORT_BYTES and not is_gob(stored) and _is_what_encode_writes(stored)


def checking_fields(stored: bytes, limits: BagLimits) -> Steps[bytes]:
    """Do what `checked_fields` does."""
    if is_ordinary(stored):
        return stored
    values = yield from decoding(stored, limits)
    if not is_gob(stored):
        return stored
    fields = yield from encoding(values)
    if len(fields) > MAX_BAG_BYTES:
        raise _damage(f"is longer than {MAX_BAG_BYTES} bytes")
    return fields


class OpenBag:
    """A bag to which changes are made one after the other; it is encoded once, after the last."""

    def __init__(self, values: dict[str, str], size_bytes: int) -> None:
        """`size_bytes` is the length of the stored form."""
        self._values = values
        self._size_bytes = size_bytes

    def put(self, key: str, value: str, *, max_entries: int) -> dict[str, str]:
        """Set one key; return the whole bag as it is then.

        Raises:
            InvalidArgument: the stored form would be over MAX_BAG_BYTES, or the key one too many. The bag is
                as it was.
        """
        values = self._values
        former = values.get(key)
        if former is None and len(values) >= max_entries:
            raise too_many_entries(max_entries)
        more_bytes = entry_bytes(key, value) - (0 if former is None else entry_bytes(key, former))
        if self._size_bytes + more_bytes > MAX_BAG_BYTES:
            raise _too_long()
        self._size_bytes += more_bytes
        values[key] = value
        return values.copy()

    def encoding(self) -> Steps[bytes]:
        """Return the stored form."""
        return encoding(self._values)


def opening(stored: bytes, *, max_entries: int = NO_LIMIT, max_key_bytes: int = NO_LIMIT) -> Steps[OpenBag]:
    """Read a stored bag for changes, by limits that are at least the defaults. Raises what `decode` does."""
    values = yield from decoding(stored, _limits_of_stored(max_entries, max_key_bytes))
    size_bytes = len((yield from encoding(values))) if is_gob(stored) else len(stored)
    return OpenBag(values, size_bytes)


@lru_cache(maxsize=1)  # they are settings, and the same for all changes
def _limits_of_stored(max_entries: int, max_key_bytes: int) -> BagLimits:
    return BagLimits(entries=max_entries, key_bytes=max_key_bytes).of_stored()


def with_value(
    stored: bytes, key: str, value: str, *, max_entries: int, max_key_bytes: int = NO_LIMIT
) -> tuple[dict[str, str], bytes]:
    """Set one key; return the new bag and its stored form.

    Raises:
        InvalidArgument: the new stored form would be over MAX_BAG_BYTES, or the key one too many.
        CorruptSession: see `decode`.
    """
    return finished(setting_value(stored, key, value, max_entries=max_entries, max_key_bytes=max_key_bytes))


def setting_value(
    stored: bytes, key: str, value: str, *, max_entries: int, max_key_bytes: int = NO_LIMIT
) -> Steps[tuple[dict[str, str], bytes]]:
    """Do what `with_value` does."""
    opened = yield from opening(stored, max_entries=max_entries, max_key_bytes=max_key_bytes)
    values = opened.put(key, value, max_entries=max_entries)
    return values, (yield from opened.encoding())


def entry_bytes(key: str, value: str) -> int:
    """Return how long an entry of the stored form is."""
    return _field_bytes(_field_bytes(len(key.encode())) + _field_bytes(len(value.encode())))


def _field_bytes(size_bytes: int) -> int:
    # A tag, the length as a varint, the content.
    return 1 + max(1, (size_bytes.bit_length() + 6) // 7) + size_bytes


def check_size(stored: bytes) -> bytes:
    """Return the stored form if it is within MAX_BAG_BYTES.

    Raises:
        InvalidArgument: it is not.
    """
    if len(stored) > MAX_BAG_BYTES:
        raise _too_long()
    return stored


def _too_long() -> InvalidArgument:
    return InvalidArgument(f"mnemosyned: bag is longer than {MAX_BAG_BYTES} bytes")


def is_gob(stored: bytes) -> bool:
    """Tell whether the Go daemon wrote these bytes."""
    return stored.startswith(_GOB_TYPE[:1])


def _damage(what: str) -> CorruptSession:
    return CorruptSession(f"mnemosyned: storage: a bag {what}")


def _is_what_encode_writes(stored: bytes) -> bool:
    """Tell whether `encode` makes these bytes: the quick answer for nearly all bags."""
    try:
        session = Session.FromString(stored)
    except DecodeError:
        return False
    is_same = session.SerializeToString(deterministic=True) == stored
    # Fields besides the bag survive the parser, and unknown ones do too.
    session.ClearField("bag")
    return is_same and not session.ByteSize()


def _protobuf_bag(stored: bytes, limits: BagLimits) -> Steps[dict[str, str]]:
    """Read our own form in one pass; the entries may have any sequence."""
    values: dict[str, str] = {}
    at, size, count, yielded_at = 0, len(stored), 0, 0
    while at < size:
        if count % STEP_ITEMS == STEP_ITEMS - 1 or at - yielded_at > STEP_BYTES:
            yielded_at = at
            yield
        key_at, end = _span(stored, at, _ENTRY_TAG)
        key_start, key_end = _span(stored, key_at, _KEY_TAG)
        value_start, at = _span(stored, key_end, _VALUE_TAG)
        if at != end:
            raise _damage("has an entry that is not one key and one value")
        if end > size:
            raise _damage("is cut short")
        if key_end - key_start > limits.key_bytes or end - value_start > limits.value_bytes:
            raise _damage("is over the limits")
        values[stored[key_start:key_end].decode()] = stored[value_start:end].decode()
        count += 1
        if len(values) != count:
            raise _damage("has a key twice")
        if count > limits.entries:
            raise _damage("is over the limits")
    return values


def _span(stored: bytes, at: int, tag: int) -> tuple[int, int]:
    """Return where the content of a length-delimited field begins and ends. Raises IndexError at the end."""
    if stored[at] != tag:
        raise _damage("has a field that no bag has")
    length = stored[at + 1]
    if length < _VARINT_CONTINUES:
        return at + 2, at + 2 + length
    return _long_span(stored, at + 1)


def _long_span(stored: bytes, at: int) -> tuple[int, int]:
    length = 0
    for number in range(_MAX_LENGTH_BYTES):
        byte = stored[at + number]
        length |= (byte & 0x7F) << 7 * number
        if byte < _VARINT_CONTINUES:
            # A last byte of 0 adds nothing: parsers differ in what they make of it.
            if not byte:
                break
            return at + number + 1, at + number + 1 + length
    raise _damage("has a length that is not in its shortest form")


class _GobReader:
    """A cursor over one gob stream that holds one Bag."""

    def __init__(self, stored: bytes, limits: BagLimits) -> None:
        self._stored = stored
        self._limits = limits
        self._at = 0

    def bag(self) -> Steps[dict[str, str]]:
        self._expect(_GOB_TYPE)
        if self._uint() != len(self._stored) - self._at:
            raise _damage("is cut short or has bytes left over")
        # A value that is not a struct is preceded by a zero field delta.
        self._expect(_GOB_VALUE_TYPE_ID + b"\0")
        limits = self._limits
        values: dict[str, str] = {}
        count = self._bounded_count()
        for number in range(1, count + 1):
            if number % STEP_ITEMS == 0:
                yield
            key = self._text(limits.key_bytes)
            values[key] = self._text(limits.value_bytes)
        if self._at != len(self._stored):
            raise _damage("has bytes left over")
        if len(values) != count:
            raise _damage("has a key twice")
        return values

    def _expect(self, expected: bytes) -> None:
        if self._take(len(expected)) != expected:
            raise _damage("has a gob value of another type")

    def _bounded_count(self) -> int:
        count = self._uint()
        # A forged count must not cost time.
        if count > self._limits.entries:
            raise _damage("is over the limits")
        return count

    def _text(self, max_bytes: int) -> str:
        size = self._uint()
        if size > max_bytes:
            raise _damage("is over the limits")
        return self._take(size).decode()

    def _uint(self) -> int:
        first = self._take(1)[0]
        if first < _GOB_ONE_BYTE_LIMIT:
            return first
        size = 0x100 - first
        if size > _GOB_MAX_UINT_BYTES:
            raise _damage("has a gob number that is too long")
        return int.from_bytes(self._take(size), "big")

    def _take(self, size: int) -> bytes:
        taken = self._stored[self._at : self._at + size]
        if len(taken) != size:
            raise IndexError(self._at)
        self._at += size
        return taken
