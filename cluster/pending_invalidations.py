"""What a peer must drop from its cache before it is asked for anything again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PendingInvalidations:
    """Tokens whose sessions were changed or ended while a peer could not be told.

    Beyond `max_tokens` they are no longer told apart, and the peer drops all that it has. Times are
    seconds on the caller's clock.
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
        """Remember these."""
        for token in tokens:
            self._changed_s[token] = now
            self._changed_s.move_to_end(token)
        if len(self._changed_s) > self._max_tokens:
            self.add_everything(now=now)

    def add_everything(self, *, now: float) -> None:
        """Remember that any session may have changed."""
        self._changed_s.clear()
        self._all_changed_s = now

    def forget(self, *, before: float) -> None:
        """Forget what changed before this: it has been told, or no copy is that old."""
        while self._changed_s and next(iter(self._changed_s.values())) < before:
            self._changed_s.popitem(last=False)
        if self._all_changed_s is not None and self._all_changed_s < before:
            self._all_changed_s = None

    def tokens(self) -> list[str]:
        """Return the tokens that are known, the oldest first."""
        return list(self._changed_s)
