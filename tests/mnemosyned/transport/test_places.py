from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import pytest

from mnemosyned.errors import Overloaded
from mnemosyned.transport.call import Call
from mnemosyned.transport.places import StreamPlaces


class Caller:
    def __init__(self, peer: str) -> None:
        self.peer = peer


def call(peer: str) -> Call:
    return cast("Call", Caller(peer))


def test_a_connection_has_so_many_places_and_no_more() -> None:
    places = StreamPlaces(per_connection=2, total=10)
    with ExitStack() as stack:
        for peer in ("a:1", "a:1", "a:2"):
            stack.enter_context(places.take(call(peer)))
        with pytest.raises(Overloaded), places.take(call("a:1")):
            pass


def test_all_connections_together_have_so_many_places_and_no_more() -> None:
    places = StreamPlaces(per_connection=2, total=3)
    with ExitStack() as stack:
        for port in range(3):
            stack.enter_context(places.take(call(f"a:{port}")))
        with pytest.raises(Overloaded), places.take(call("a:9")):
            pass


def test_a_place_is_given_back_also_by_a_stream_that_fails() -> None:
    places = StreamPlaces(per_connection=1, total=1)
    with pytest.raises(KeyError), places.take(call("a:1")):
        raise KeyError

    with places.take(call("a:2")):
        pass
    assert not places._taken
