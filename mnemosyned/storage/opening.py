"""A store whose calls wait while it is opened for the first time.

The daemon listens before its storage is open, and a balancer without health checks sends calls to a node that
listens. A storage that can be reached is open a moment later, so these calls need not fail. Once the first
try is over they do, if it failed: a storage that is away may be away for hours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from mnemosyned.sessions.store import EngineStore

P = ParamSpec("P")
Result = TypeVar("Result")

# As long as a connection may take by default. Callers have deadlines of their own.
_LONGEST_S: Final = 2.0
# What callers of the daemon wait for. All else is called by its upkeep, after the opening.
_OF_CALLS: Final = (
    "start",
    "load",
    "exist",
    "set_values",
    "abandon",
    "find",
    "walk",
    "delete",
    "rename",
)


def waiting(store: EngineStore) -> EngineStore:
    """Return a store, not yet opened, whose calls wait for the end of its first `open`, 2 s at most."""
    return cast("EngineStore", _Waiting(store))


class _Waiting:
    def __init__(self, store: EngineStore) -> None:
        self._store = store
        self._has_tried = asyncio.Event()
        for name in _OF_CALLS:
            if hasattr(store, name):
                setattr(self, name, self._after_the_first_try(getattr(store, name)))

    async def open(self) -> None:
        try:
            await self._store.open()
        finally:
            self._has_tried.set()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # as the store has it
        return getattr(self._store, name)

    def _after_the_first_try(self, call: Callable[P, Awaitable[Result]]) -> Callable[P, Awaitable[Result]]:
        @wraps(call)
        async def wait_and_call(*args: P.args, **kwargs: P.kwargs) -> Result:
            if not self._has_tried.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LONGEST_S):
                        await self._has_tried.wait()
            return await call(*args, **kwargs)

        return wait_and_call
