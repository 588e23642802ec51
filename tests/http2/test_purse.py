from __future__ import annotations

from http2.purse import Purse

FULL = 10_000


def test_a_full_purse_pays_for_ten_thousand_frames() -> None:
    purse = Purse(0.0)

    assert purse.pay(FULL, 0.0, sent_bytes=0)
    assert not purse.pay(1, 0.0, sent_bytes=0)


def test_time_fills_it_up_to_its_bound() -> None:
    purse = Purse(0.0)
    purse.pay(FULL, 0.0, sent_bytes=0)

    assert purse.pay(1000, 1.0, sent_bytes=0)
    assert not purse.pay(FULL + 1, 3600.0, sent_bytes=0)


def test_answers_and_bytes_fill_it() -> None:
    purse = Purse(0.0)
    purse.pay(FULL, 0.0, sent_bytes=0)

    purse.answers = 10
    assert purse.pay(20, 0.0, sent_bytes=0)
    assert purse.pay(2, 0.0, sent_bytes=4096)
    assert not purse.pay(1, 0.0, sent_bytes=4096)
