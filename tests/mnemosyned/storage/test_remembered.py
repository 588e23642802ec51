"""What a node remembers of bags is bounded, and is whatever was added last."""

from __future__ import annotations

from mnemosyned.storage.remembered import Remembered


def test_a_value_is_taken_once() -> None:
    remembered = Remembered()
    remembered.add(b"t", b"one")
    remembered.add(b"t", b"two")

    assert [remembered.take(b"t"), remembered.take(b"t")] == [b"two", None]


def test_a_large_value_is_not_remembered_and_neither_is_the_one_before_it() -> None:
    remembered = Remembered()
    remembered.add(b"t", b"small")
    remembered.add(b"t", bytes(1025))

    assert remembered.take(b"t") is None


def test_the_values_that_were_added_first_are_forgotten_when_there_are_too_many() -> None:
    remembered = Remembered()
    for number in range(10_000):
        remembered.add(b"%d" % number, bytes(1000))
    kept = [number for number in range(10_000) if remembered.take(b"%d" % number) is not None]

    assert kept == list(range(kept[0], 10_000))
    assert 6000 < len(kept) < 8000
