from __future__ import annotations

from cluster.untold import Untold


def test_what_was_added_is_known_the_oldest_first() -> None:
    untold = Untold(max_tokens=10)
    assert not untold
    untold.add(["a", "b"], now=1.0)
    untold.add(["a"], now=2.0)

    assert untold
    assert untold.tokens() == ["b", "a"]
    assert not untold.is_everything


def test_what_changed_again_meanwhile_stays() -> None:
    untold = Untold(max_tokens=10)
    untold.add(["a", "b"], now=1.0)
    untold.add(["a"], now=2.0)
    untold.forget(before=2.0)

    assert untold.tokens() == ["a"]
    untold.forget(before=2.1)
    assert not untold


def test_too_many_tokens_become_everything() -> None:
    untold = Untold(max_tokens=2)
    untold.add(["a", "b", "c"], now=1.0)

    assert untold
    assert untold.is_everything
    assert untold.tokens() == []


def test_everything_is_forgotten_in_its_time_too() -> None:
    untold = Untold(max_tokens=1)
    untold.add(["a", "b"], now=1.0)
    untold.add(["c"], now=5.0)
    untold.forget(before=1.0)
    assert untold.is_everything
    untold.forget(before=4.0)

    assert not untold.is_everything
    assert untold.tokens() == ["c"]


def test_everything_may_be_added_at_once() -> None:
    untold = Untold(max_tokens=10)
    untold.add(["a"], now=1.0)
    untold.add_everything(now=2.0)

    assert untold.is_everything
    assert untold.tokens() == []
