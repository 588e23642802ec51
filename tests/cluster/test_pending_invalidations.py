from __future__ import annotations

from cluster.pending_invalidations import PendingInvalidations


def test_what_was_added_is_known_the_oldest_first() -> None:
    pending = PendingInvalidations(max_tokens=10)
    assert not pending
    pending.add(["a", "b"], now=1.0)
    pending.add(["a"], now=2.0)

    assert pending
    assert pending.tokens() == ["b", "a"]
    assert not pending.is_everything


def test_what_changed_again_meanwhile_stays() -> None:
    pending = PendingInvalidations(max_tokens=10)
    pending.add(["a", "b"], now=1.0)
    pending.add(["a"], now=2.0)
    pending.forget(before=2.0)

    assert pending.tokens() == ["a"]
    pending.forget(before=2.1)
    assert not pending


def test_too_many_tokens_become_everything() -> None:
    pending = PendingInvalidations(max_tokens=2)
    pending.add(["a", "b", "c"], now=1.0)

    assert pending
    assert pending.is_everything
    assert pending.tokens() == []


def test_everything_is_forgotten_in_its_time_too() -> None:
    pending = PendingInvalidations(max_tokens=1)
    pending.add(["a", "b"], now=1.0)
    pending.add(["c"], now=5.0)
    pending.forget(before=1.0)
    assert pending.is_everything
    pending.forget(before=4.0)

    assert not pending.is_everything
    assert pending.tokens() == ["c"]


def test_everything_may_be_added_at_once() -> None:
    pending = PendingInvalidations(max_tokens=10)
    pending.add(["a"], now=1.0)
    pending.add_everything(now=2.0)

    assert pending.is_everything
    assert pending.tokens() == []
