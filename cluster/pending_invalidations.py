"""What a peer must drop from its cache before it is asked for anything again. Pure.

A write was acknowledged, and a peer with a copy of the old session could not be told. From then on the peer's
answers may be wrong. The tokens stay here until the peer has dropped them, or until every copy from before
the write has expired.

The same class remembers what changed on this node lately (forward.py, `changed`): a node that becomes owner
of such a token may hold a copy from before the change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PendingInvalidations:
    """Tokens whose sessions were changed or ended while a peer could not be told.

    Beyond `max_tokens` single tokens are given up, and the peer drops all that it has. That costs the peer
    some queries, and never a wrong answer. Times are seconds on the caller's clock.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._changed_s: OrderedDict[str, float] = OrderedDict()  # the oldest first
        self._all_changed_s: float | None = None  # when tokens beyond the bound last changed

    def __bool__(self) -> bool:
        return bool(self._changed_s) or self._all_changed_s is not None

    @property
    def is_everything(self) -> bool:
        """Whether single tokens are not known any more."""
        return self._all_changed_s is not None

    def add(self, tokens: Iterable[str], *, now: float) -> None:
        """Remember that these sessions changed now; a token that is known already counts from now on."""
        for token in tokens:
            self._changed_s[token] = now
            self._changed_s.move_to_end(token)
        if len(self._changed_s) > self._max_tokens:
            self.add_everything(now=now)

    def add_everything(self, *, now: float) -> None:
        """Remember that any session may have changed; single tokens add nothing to that."""
        self._changed_s.clear()
        self._all_changed_s = now

    def forget(self, *, before: float) -> None:
        """Forget what changed before this: the peer has dropped it, or no copy is that old.

        What changed at this instant or later stays. A token that is added while the peer is being told is
        therefore delivered again.
        """
        while self._changed_s and next(iter(self._changed_s.values())) < before:
            self._changed_s.popitem(last=False)
        if self._all_changed_s is not None and self._all_changed_s < before:
            self._all_changed_s = None

    def tokens(self) -> list[str]:
        """Return the single tokens that are known, the oldest first; not all, if `is_everything`."""
        return list(self._changed_s)
