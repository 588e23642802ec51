"""A coroutine around another one, which leaves the inner one in order whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class Around(Coroutine[Any, Any, T]):
    """Runs what `outer` makes of a coroutine; if it ends before it has begun, it closes the inner one.

    A coroutine of Python's would leave the inner one behind, and Python would log that it was never awaited.
    That happens to each call that is cancelled, or whose deadline passes, before the first step of its task.
    """

    __slots__ = ("_begun", "_inner", "_make")

    def __init__(
        self,
        inner: Coroutine[Any, Any, Any],
        outer: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, T]],
    ) -> None:
        self._inner = inner
        self._make = outer
        self._begun: Coroutine[Any, Any, T] | None = None

    def __await__(self) -> Generator[Any, Any, T]:
        return self._outer().__await__()

    def send(self, value: Any) -> Any:  # noqa: ANN401  # as in Coroutine
        """See Coroutine."""
        return self._outer().send(value)

    def throw(self, *error: Any) -> Any:  # noqa: ANN401  # as in Coroutine
        """See Coroutine."""
        if self._begun is None:
            self._inner.close()
        return self._outer().throw(*error)

    def close(self) -> None:
        """See Coroutine."""
        (self._inner if self._begun is None else self._begun).close()

    def _outer(self) -> Coroutine[Any, Any, T]:
        if self._begun is None:
            self._begun = self._make(self._inner)
        return self._begun
