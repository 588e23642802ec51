"""What a node remembers of sessions' bags, so that it can change one without reading it first. Pure.

The memory need not be right. A change is written only where the storage still has what is remembered.
Otherwise the bag is read, and the change made once more.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# What is remembered is sent again with each change, or copied.
_MAX_VALUE_BYTES: Final = 1024
_MAX_MEMORY_BYTES: Final = 8 * 1024**2
_ENTRY_BYTES: Final = 250  # Python objects around a token and its value


class Remembered:
    """The small values that were last read or written, by the bytes of tokens."""

    def __init__(self) -> None:
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._size_bytes = 0

    def add(self, token: bytes, value: bytes) -> None:
        """Remember a value; those that were added first are forgotten for it."""
        self.take(token)
        if len(value) > _MAX_VALUE_BYTES:
            return
        self._values[token] = value
        self._size_bytes += len(token) + len(value) + _ENTRY_BYTES
        while self._size_bytes > _MAX_MEMORY_BYTES:
            self.take(next(iter(self._values)))

    def take(self, token: bytes) -> bytes | None:
        """Forget a value, and return it; None: there is none."""
        value = self._values.pop(token, None)
        if value is not None:
            self._size_bytes -= len(token) + len(value) + _ENTRY_BYTES
        return value
