from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyned.config.duration import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24m", 1440),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("500ms", 0.5),
        ("100us", 1e-4),
        ("100µs", 1e-4),
        ("100μs", 1e-4),  # both letters
        ("10ns", 1e-8),
        ("-1m", -60),
        ("+1m", 60),
        ("0", 0),
        ("-0", 0),
        ("1h1m1s1ms", 3661.001),
    ],
)
def test_gos_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "24", "1d", "1h!!!30m", "1mm", "m", ".s", "1 m", "1m ", "--1m", "1H", "٣m", "00", "1e3s"]
)
def test_what_go_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1440, "24m"), (90, "1m30s"), (0.5, "500ms"), (0, "0"), (-60, "-1m"), (3600, "1h"), (0.0001, "0")],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(-(10**10), 10**10))
def test_what_is_written_is_read_back(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)
