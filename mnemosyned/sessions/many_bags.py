"""Many stored bags, such as those of a page of List, read at once. Pure.

The parser and the writer of protobuf take most of their time for one bag to begin and to end. A message that
has many bags costs a third of it. If anything is wrong in it, `bag.py` finds in which.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from mnemosyned.sessions.bag import SHORT_BYTES
from mnemosyned.sessions.encoded import Heads

_HEADS: Final = Heads(b"\x0a")  # field 1, length-delimited


def are_ordinary(bags: Sequence[bytes]) -> bool:
    """Tell whether each bag is one of which `bag.is_ordinary` is true."""
    if max(map(len, bags), default=0) > SHORT_BYTES:
        return False
    joined = b"".join(chain.from_iterable(zip(_HEADS.before(bags), bags, strict=False)))
    try:
        parsed = _Bags.FromString(joined)
    except DecodeError:
        return False
    # Each bag has its own bounds, so that none can hide in the next. What is no entry is unknown, and goes.
    parsed.DiscardUnknownFields()
    return bool(parsed.SerializeToString(deterministic=True) == joined)


def _bags_class() -> Any:  # noqa: ANN401  # made at run time
    """Return a message of many bags: field 1 of it is repeated, and each has the field that a Session has."""
    file = FileDescriptorProto(name="mnemosyned/bags.proto", package="mnemosyned", syntax="proto3")
    bag, bags = file.message_type.add(name="Bag"), file.message_type.add(name="Bags")
    entry = bag.nested_type.add(name="BagEntry", options={"map_entry": True})
    text, message = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.TYPE_MESSAGE
    one, many = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED
    entry.field.add(name="key", number=1, type=text, label=one)
    entry.field.add(name="value", number=2, type=text, label=one)
    bag.field.add(name="bag", number=4, type=message, label=many, type_name=".mnemosyned.Bag.BagEntry")
    bags.field.add(name="bags", number=1, type=message, label=many, type_name=".mnemosyned.Bag")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName("mnemosyned.Bags"))


_Bags: Final = _bags_class()
