from __future__ import annotations

import sys

import pytest
from raw_http2 import DATA, PREFACE, frames_of, request, settings, window_update

from http2.core import NEED_DATA, Core, Sender, server_core
from http2.outbox import Outbox, Tally

WINDOW = 65_535
TURN = 256 * 1024
SLICE = 64 * 1024
WIDE = 2**30


class Sending:
    """An outbox whose peer has opened some streams, with windows of some size."""

    def __init__(self, streams: int = 1, *, window: int | None = None) -> None:
        self.core: Core = server_core(max_streams=128, max_header_bytes=1000)[0]
        self.total = Tally()
        self.outbox = Outbox(self.core, self.total)
        self.senders: dict[int, Sender] = {}
        self.receive(PREFACE)
        if window is not None:
            self.receive(settings((4, window)) + window_update(0, WIDE))
        for stream_id in range(1, 2 * streams, 2):
            self.receive(request(stream_id))
            self.senders[stream_id] = self.core.stream(stream_id)
            self.senders[stream_id].send_response(200, [])
        self.core.data_to_send()

    def receive(self, data: bytes) -> None:
        self.core.receive_data(data)
        while self.core.next_event() is not NEED_DATA:
            pass

    def hold(self, stream_id: int, body: bytes, now_s: float = 0.0) -> None:
        self.outbox.hold(self.senders[stream_id], stream_id, (body,), now_s)

    def fits(self, size_bytes: int, stream_id: int = 1) -> bool:
        return self.outbox.fits(self.senders[stream_id], stream_id, size_bytes)

    def turn(self, now_s: float = 0.0) -> dict[int, int]:
        """Take one turn; return how many bytes of each stream were framed in it."""
        self.outbox.pump(now_s)
        self.outbox.begin_turn()
        framed: dict[int, int] = {}
        for sent in frames_of(self.core.data_to_send()):
            if sent.kind == DATA and sent.payload:
                framed[sent.stream_id] = framed.get(sent.stream_id, 0) + len(sent.payload)
        return framed


def test_a_part_fits_while_the_window_of_its_stream_is_open() -> None:
    sending = Sending()
    sending.receive(window_update(0, WIDE))

    assert sending.fits(WINDOW)
    sending.outbox.begin_turn()
    assert not sending.fits(WINDOW + 1)


def test_a_part_fits_while_the_window_of_the_connection_is_open() -> None:
    sending = Sending()
    sending.receive(window_update(1, WIDE))

    assert not sending.fits(WINDOW + 1)
    assert sending.fits(WINDOW)


def test_a_part_fits_while_the_turn_has_room() -> None:
    sending = Sending(window=WIDE)

    assert sending.fits(TURN)
    assert not sending.fits(1)
    sending.outbox.begin_turn()
    assert sending.fits(1)
    assert sending.outbox.sent_bytes == TURN


def test_a_part_never_overtakes_what_is_held_of_its_stream() -> None:
    sending = Sending(2)
    sending.hold(1, b"first")

    assert not sending.fits(1)
    assert sending.fits(1, stream_id=3)


def test_nothing_fits_in_a_pause() -> None:
    sending = Sending(window=WIDE)
    sending.hold(1, b"held")
    sending.outbox.pause(True)

    assert not sending.fits(1)
    assert sending.turn() == {}
    sending.outbox.pause(False)
    assert sending.turn() == {1: 4}


def test_streams_share_a_turn() -> None:
    sending = Sending(3, window=WIDE)
    for stream_id in sending.senders:
        sending.hold(stream_id, bytes(TURN))

    turns = [sending.turn() for _ in range(3)]

    assert turns[0] == {1: 2 * SLICE, 3: SLICE, 5: SLICE}
    sums = {stream_id: sum(turn[stream_id] for turn in turns) for stream_id in sending.senders}
    assert sums == dict.fromkeys(sending.senders, TURN)
    assert sending.total.size_bytes == sending.outbox.unsent_bytes == 0


def test_a_shut_window_of_one_stream_does_not_hinder_another() -> None:
    sending = Sending(2, window=0)
    sending.hold(1, bytes(100))
    sending.hold(3, bytes(100))
    sending.receive(window_update(3, 60))

    assert sending.turn() == {3: 60}
    assert (sending.outbox.unsent_of(1), sending.outbox.unsent_of(3)) == (100, 40)


def test_a_window_below_zero_is_shut() -> None:
    sending = Sending()
    sending.senders[1].send_data(bytes(1000))
    sending.receive(settings((4, 0)))

    assert sending.senders[1].send_window == -1000
    assert not sending.fits(0)
    sending.hold(1, b"x")
    assert sending.turn() == {1: 1000}  # what was framed before
    sending.receive(window_update(1, 1000))
    assert sending.turn() == {}
    sending.receive(window_update(1, 1))
    assert sending.turn() == {1: 1}


def test_pieces_are_held_without_a_copy() -> None:
    sending = Sending(window=0)
    piece = bytes(1000)
    references = sys.getrefcount(piece)

    for _ in range(5):
        sending.hold(1, piece)

    assert sys.getrefcount(piece) == references + 5


def test_trailers_follow_what_is_held() -> None:
    sending = Sending(window=0)
    assert not sending.outbox.end(1, None)
    sending.hold(1, b"abc")
    assert sending.outbox.end(1, [(b"grpc-status", b"0")])

    sending.receive(window_update(1, 3))

    assert sending.outbox.pump(0.0) == [1]
    assert [sent.flags & 1 for sent in frames_of(sending.core.data_to_send())][-1] == 1
    assert len(sending.outbox) == 0


def test_what_is_dropped_is_counted_out() -> None:
    sending = Sending(3, window=0)
    for stream_id in sending.senders:
        sending.hold(stream_id, b"abc")

    sending.outbox.drop(1)
    assert sending.total.size_bytes == 6
    sending.outbox.clear()
    assert sending.total.size_bytes == sending.outbox.unsent_bytes == 0


def test_a_stream_is_stuck_when_its_window_stays_shut() -> None:
    sending = Sending(2, window=0)
    sending.hold(1, bytes(100), 1.0)
    sending.hold(3, bytes(100), 1.0)
    sending.receive(window_update(3, 60))
    sending.turn(5.0)

    assert sending.outbox.stuck_since(4.0) == [1]
    assert not sending.outbox.is_stuck_since(4.0)
    assert sending.outbox.stuck_since(5.0) == [1, 3]
    assert sending.outbox.is_stuck_since(5.0)


@pytest.mark.parametrize("streams", [100])
def test_a_stream_that_waits_for_its_turn_is_not_stuck(streams: int) -> None:
    sending = Sending(streams, window=WIDE)
    for stream_id in sending.senders:
        sending.hold(stream_id, bytes(SLICE), 0.0)

    sending.turn(30.0)

    assert sending.outbox.stuck_since(29.0) == []
    assert not sending.outbox.is_stuck_since(29.0)


def test_nothing_is_stuck_where_nothing_is_held() -> None:
    sending = Sending(window=0)
    assert not sending.outbox.is_stuck_since(100.0)

    sending.hold(1, b"x", 100.0)

    assert not sending.outbox.is_stuck_since(99.0)
    assert sending.outbox.is_stuck_since(100.0)
