"""Work in small steps: a generator that yields wherever others may have their turn. Pure.

A step takes about a tenth of a millisecond. Work that does not suspend says nothing of when its steps run: a
command runs them at once (`finished`), the event loop in slices (slices.py).

What is small is done in the first step, without a yield. What cannot be cut, such as one string of megabytes,
is a step of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]

# About as much as a step may do: items of a kind that costs a microsecond, and bytes that are copied.
STEP_ITEMS: Final = 128
STEP_BYTES: Final = 64 * 1024


def finished(steps: Steps[T]) -> T:
    """Run all steps now; return what they come to."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def cut(items: Sequence[T], size: int = STEP_ITEMS) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of a size; the last may be smaller."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
