"""How many streams of one kind may be open: on one connection, and in all.

A call that lasts costs memory for as long as its client likes, and each change of what it watches costs work
for each of them. A client needs one on a connection. Methods that clients may call without a credential have
such a bound; calls between nodes have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from mnemosyned.errors import Overloaded
from mnemosyned.transport.call import Call


class StreamPlaces:
    """The places for streams of one kind. On the event loop alone: it has no lock."""

    def __init__(self, *, per_connection: int, total: int) -> None:
        self._per_connection = per_connection
        self._total = total
        self._taken: Counter[str] = Counter()  # by connection
        self._taken_count = 0

    @contextmanager
    def take(self, call: Call) -> Iterator[None]:
        """Have a place while the block runs.

        Raises:
            Overloaded: there is none left.
        """
        # The address and the port of a client: no two connections have both in common at one time.
        connection = call.peer
        if self._taken[connection] >= self._per_connection or self._taken_count >= self._total:
            raise Overloaded("mnemosyned: too many streams are open")
        self._taken[connection] += 1
        self._taken_count += 1
        try:
            yield
        finally:
            self._taken_count -= 1
            self._taken[connection] -= 1
            if not self._taken[connection]:
                del self._taken[connection]
