"""A result that is given to who waits for it in the same step in which it becomes known.

A future tells its waiters a turn of the event loop later, and each of them is a task: for a call that only
passes through, tasks and turns cost more than the call itself. A Later has steps instead. Each step gets the
outcome of the one before, and returns its own:

    source ── set_result ──> step ──> step ──> `then`: who waits in the end
                             by `through`

An outcome is a result, an exception, or a coroutine that goes on with the work. What a step raises is its
outcome too. Steps run where the result becomes known, so they must be short, and may not wait.

Whoever waits may give up or cancel: the steps then get the reason, and the source hears of it by `on_cancel`.
Only what comes first counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

from aio.around import Around

if TYPE_CHECKING:
    from aio.tasks import Tasks

T = TypeVar("T")
U = TypeVar("U")

Outcome: TypeAlias = T | BaseException | Coroutine[Any, Any, T]


class Later(Generic[T]):
    """A result that is not known yet. Where it has a future's methods, they do what a future's do."""

    __slots__ = ("_is_done", "_outcome", "_steps", "_take", "on_cancel")

    def __init__(self) -> None:
        self._is_done = False
        self._outcome: Any = None
        self._steps: list[Callable[[Any], Any]] = []
        self._take: Callable[[Any], None] | None = None
        self.on_cancel: Callable[[], object] | None = None

    def through(self, step: Callable[[Outcome[T]], Outcome[U]]) -> Later[U]:
        """Have the outcome pass a step, after those that there are; return this Later, as what it becomes."""
        if self._is_done:
            self._outcome = _outcome_of(step, self._outcome)
        else:
            self._steps.append(step)
        return cast("Later[U]", self)

    def map(self, make: Callable[[T], U]) -> Later[U]:
        """Have a result made into another one, also one that the work comes to with which it goes on."""
        return self.through(partial(_mapped, make))

    def then(self, take: Callable[[Outcome[T]], None]) -> None:
        """Give the outcome to who waits for it; there is one."""
        if self._is_done:
            take(self._outcome)
        else:
            self._take = take

    def done(self) -> bool:
        """Tell whether the result is known, or nobody waits for it any more."""
        return self._is_done

    def set_result(self, result: T) -> None:
        """Take the result, and give it to who waits."""
        if self._is_done:
            return
        self._is_done = True
        outcome: Any = result
        for step in self._steps:
            # As `_outcome_of`, without the call: most calls have several steps.
            try:
                outcome = step(outcome)
            except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001  # the step's outcome
                outcome = exc
        take, self._steps, self._take, self.on_cancel = self._take, [], None, None
        if take is None:
            self._outcome = outcome
            return
        try:
            take(outcome)
        except Exception as exc:  # noqa: BLE001  # a bug of who waits is none of the source's
            context = {"message": "a result could not be taken", "exception": exc}
            asyncio.get_running_loop().call_exception_handler(context)

    def set_exception(self, exc: BaseException) -> None:
        """Take note that there is no result."""
        self.set_result(cast("T", exc))

    def cancel(self) -> None:
        """Take note that nobody waits any more."""
        self.give_up(asyncio.CancelledError())

    def give_up(self, reason: BaseException) -> None:
        """Fail for a reason that is none of the source's, which is told that it is not waited for."""
        if not self._is_done:
            on_cancel = self.on_cancel
            self.set_exception(reason)
            if on_cancel is not None:
                on_cancel()

    def close(self) -> None:
        """Cancel it, or close the work with which it would go on."""
        self.cancel()
        if isinstance(self._outcome, Coroutine):
            self._outcome.close()

    def __await__(self) -> Generator[Any, Any, T]:
        if not self._is_done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.then(lambda outcome: self._wake(waiter, outcome))
            try:
                yield from waiter
            except asyncio.CancelledError:
                self.cancel()
                if isinstance(self._outcome, Coroutine):
                    self._outcome.close()
                raise
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        if isinstance(self._outcome, Coroutine):
            return cast("T", (yield from self._outcome.__await__()))
        return cast("T", self._outcome)

    def _wake(self, waiter: asyncio.Future[None], outcome: Outcome[T]) -> None:
        self._outcome = outcome
        if not waiter.done():
            waiter.set_result(None)


def _mapped(make: Callable[[T], U], outcome: Outcome[T]) -> Outcome[U]:
    if isinstance(outcome, BaseException):
        return outcome
    if isinstance(outcome, Coroutine):
        return Around(outcome, partial(_made, make))
    return make(outcome)


async def _made(make: Callable[[T], U], work: Coroutine[Any, Any, T]) -> U:
    return make(await work)


def _outcome_of(step: Callable[[Any], Any], outcome: Any) -> Any:  # noqa: ANN401  # of any types
    try:
        return step(outcome)
    except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001  # the step's outcome
        return exc


def failed(exc: BaseException) -> Later[Any]:
    """Return a Later that has failed."""
    later: Later[Any] = Later()
    later.set_exception(exc)
    return later


def begun(work: Coroutine[Any, Any, T], tasks: Tasks) -> Later[T]:
    """Run work as a task; return its result as a Later, which cancels it when it is cancelled itself.

    Without a task, because `tasks` is closed or full, it is cancelled.
    """
    later: Later[T] = Later()
    task = tasks.spawn(_run(work, later))
    if task is None:
        work.close()
        later.cancel()
    else:
        later.on_cancel = task.cancel
        # A task that is cancelled before its first step runs nothing, so it is told of here.
        task.add_done_callback(lambda _: _end(work, later))
    return later


def _end(work: Coroutine[Any, Any, Any], later: Later[Any]) -> None:
    work.close()
    later.cancel()


async def _run(work: Coroutine[Any, Any, T], later: Later[T]) -> None:
    try:
        later.set_result(await work)
    except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001  # who waits gets it
        later.set_exception(exc)
