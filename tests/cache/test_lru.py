from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cache.lru import Lru, Slot


def slot(value: str, size_bytes: int = 1) -> Slot[str]:
    return Slot(value, size_bytes, fresh_until_us=1)


def test_a_kept_slot_is_found_again() -> None:
    lru: Lru[str] = Lru(max_entries=2, max_bytes=10)
    lru.put("a", slot("A", 3))

    found = lru.peek("a")

    assert found is not None
    assert found.value == "A"
    assert lru.size_bytes == 3
    assert lru.peek("b") is None


def test_the_least_recently_read_goes_first() -> None:
    lru: Lru[str] = Lru(max_entries=2, max_bytes=10)
    lru.put("a", slot("A"))
    lru.put("b", slot("B"))
    lru.peek("a")
    lru.put("c", slot("C"))

    assert "b" not in lru
    assert "a" in lru
    assert "c" in lru


def test_bytes_are_bounded() -> None:
    lru: Lru[str] = Lru(max_entries=10, max_bytes=10)
    lru.put("a", slot("A", 6))
    lru.put("b", slot("B", 6))

    assert "a" not in lru
    assert lru.size_bytes == 6


def test_a_slot_over_the_bound_is_not_kept() -> None:
    lru: Lru[str] = Lru(max_entries=10, max_bytes=10)
    lru.put("a", slot("A", 11))

    assert len(lru) == 0
    assert lru.size_bytes == 0


def test_a_new_slot_takes_the_place_of_the_old_one() -> None:
    lru: Lru[str] = Lru(max_entries=10, max_bytes=10)
    lru.put("a", slot("A", 6))
    lru.put("a", slot("B", 2))

    assert lru.size_bytes == 2
    assert len(lru) == 1


def test_keys_are_found_by_prefix() -> None:
    lru: Lru[str] = Lru(max_entries=10, max_bytes=10)
    for key in ("ab", "ac", "b"):
        lru.put(key, slot(key))

    assert lru.keys_with_prefix("a") == ["ab", "ac"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12), st.booleans())))
def test_bounds_hold_after_every_step(steps: list[tuple[str, int, bool]]) -> None:
    lru: Lru[str] = Lru(max_entries=4, max_bytes=20)
    for key, size_bytes, is_put in steps:
        if is_put:
            lru.put(key, slot(key, size_bytes))
        else:
            lru.pop(key)

        assert len(lru) <= 4
        assert lru.size_bytes <= 20
        kept = [lru.peek(key) for key in lru.keys_with_prefix("")]
        assert lru.size_bytes == sum(one.size_bytes for one in kept if one)
