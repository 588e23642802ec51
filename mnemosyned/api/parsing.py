"""Requests from bytes to messages: small ones at once, large ones in steps.

The parser of protobuf cannot be interrupted, and it has no bound but the size of a message: 4 MiB hold two
million fields, or 300,000 entries of a bag, which take it tens to hundreds of milliseconds. A large request
is therefore cut between two fields, and the parser gets one piece after the other:

    StartRequest   | session: … ─────────────────────────────────────────────── |
    Session                   | access_token | entry | entry | entry | entry | … |
                              └────── piece ─────────┴────── piece ─────────┴ … ┘

The result is what the parser makes of the whole, because it reads fields one after the other too, and merges
what comes twice. What is cut is bounded: the entries of a bag by their own limit, and all other fields by
_MAX_FIELDS. No client of ours sends more than a dozen.

The steps of what is larger than `AT_ONCE_BYTES` are run in slices (aio/slices.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NoReturn, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from aio.steps import STEP_BYTES, STEP_ITEMS, Steps
from mnemosyned.errors import InvalidArgument, MalformedMessage
from mnemosyned.sessions.bag import too_many_entries

# Up to here a message holds too few fields to take long.
AT_ONCE_BYTES: Final = 16 * 1024
_MAX_FIELDS: Final = 1000
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5
_MAX_VARINT_BYTES: Final = 10
_VARINT_CONTINUES: Final = 0x80

Request = TypeVar("Request", bound=Message)


def parsed(request_type: Callable[[], Request], message: bytes) -> Request:
    """Parse a request.

    Raises:
        MalformedMessage: the bytes are no such message; strings must be UTF-8. The text names the type of
            the message and quotes nothing, since a token may be in the bytes.
    """
    request = request_type()
    try:
        request.ParseFromString(message)
    except DecodeError:
        _refuse(request)
    return request


def parsing(request_type: Callable[[], Request], message: bytes, *, max_entries: int) -> Steps[Request]:
    """Do what `parsed` does, in steps.

    An entry counts even if a later one has its key.

    Raises:
        InvalidArgument: a bag has more than `max_entries`, or the message very many other fields.
    """
    request = request_type()
    yield
    try:
        yield from _Cutter(message, max_entries).merging(request, 0, len(message))
    except (DecodeError, IndexError):
        _refuse(request)
    return request


def _refuse(request: Message) -> NoReturn:
    raise MalformedMessage(f"mnemosyned: the request is not a valid {request.DESCRIPTOR.full_name}") from None


class _Cutter:
    """One message, and what may still come of it."""

    def __init__(self, data: bytes, max_entries: int) -> None:
        self._data = data
        self._max_entries = max_entries
        self._entries = 0
        self._fields = 0

    def merging(self, into: Message, at: int, end: int) -> Steps[None]:
        """Merge the fields between two places into a message, piece by piece."""
        data, nested = self._data, _nested_fields(into.DESCRIPTOR)
        begin, number = at, 0
        while at < end:
            number += 1
            tag, body_at, after = self._field(at, end)
            field = nested.get(tag)
            if field is None or not field.is_map:
                self._count_field()
            else:
                self._count_entry()
            if field is not None and after - at > AT_ONCE_BYTES:
                into.MergeFromString(data[begin:at])
                begin = at
                if field.is_map:
                    self._count_fields(body_at, after)
                else:
                    yield from self.merging(getattr(into, field.name), body_at, after)
                    begin = after
            at = after
            if number % STEP_ITEMS == 0 or at - begin > STEP_BYTES:
                yield
                into.MergeFromString(data[begin:at])
                begin = at
        into.MergeFromString(data[begin:end])

    def _count_fields(self, at: int, end: int) -> None:
        """Count the fields of a large entry, which the parser takes as a whole."""
        while at < end:
            _, _, at = self._field(at, end)
            self._count_field()

    def _count_field(self) -> None:
        self._fields += 1
        if self._fields > _MAX_FIELDS:
            raise InvalidArgument(f"mnemosyned: the request has more than {_MAX_FIELDS} fields")

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > self._max_entries:
            raise too_many_entries(self._max_entries)

    # Most of the time of a large bag passes here and in the loop around it.
    def _field(self, at: int, end: int) -> tuple[int, int, int]:
        """Return a field's tag, where its content begins if it has a length, and where the field ends.

        Raises:
            DecodeError: it does not end in time, or has a form that none of ours has, as a group.
        """
        data = self._data
        tag, body_at = data[at], at + 1
        if tag >= _VARINT_CONTINUES:
            tag, body_at = self._varint(at)
        kind = tag & 7
        if kind == _LENGTH:
            length = data[body_at]
            if length < _VARINT_CONTINUES:
                body_at += 1
            else:
                length, body_at = self._varint(body_at)
            after = body_at + length
        elif kind == _VARINT:
            _, after = self._varint(body_at)
        elif kind in (_FIXED_64, _FIXED_32):
            after = body_at + (8 if kind == _FIXED_64 else 4)
        else:
            raise DecodeError
        if after > end:
            raise DecodeError
        return tag, body_at, after

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for number in range(_MAX_VARINT_BYTES):
            byte = self._data[at + number]
            value |= (byte & 0x7F) << 7 * number
            if byte < _VARINT_CONTINUES:
                return value, at + number + 1
        raise DecodeError


@dataclass(frozen=True, slots=True)
class _Nested:
    """A field whose content is a message."""

    name: str
    is_map: bool


@lru_cache(maxsize=64)
def _nested_fields(descriptor: Descriptor) -> dict[int, _Nested]:
    """Return the fields whose content is a message, by tag."""
    return {
        field.number << 3 | _LENGTH: _Nested(field.name, field.message_type.GetOptions().map_entry)
        for field in descriptor.fields
        if field.message_type is not None
    }
