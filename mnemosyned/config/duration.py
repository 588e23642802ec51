"""Durations as Go writes them: `24m`, `1h30m`, `1.5h`, `500ms`.

The grammar is that of Go's time.ParseDuration.
"""

from __future__ import annotations

import re
from typing import Final

_SECONDS_BY_UNIT: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,  # the micro sign
    "μs": 1e-6,  # the Greek letter, which Go takes too
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_NUMBER: Final = r"(\d+\.?\d*|\.\d+)"
_UNIT: Final = "(" + "|".join(sorted(_SECONDS_BY_UNIT, key=len, reverse=True)) + ")"
_PART: Final = re.compile(_NUMBER + _UNIT, re.ASCII)
_DURATION: Final = re.compile(rf"([+-]?)(0|(?:{_NUMBER}{_UNIT})+)", re.ASCII)


def parse_duration(text: str) -> float:
    """Return the duration in seconds.

    Raises:
        ValueError: the text is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 24m, 1m30s or 500ms")
    sign, parts = match[1], match[2]
    seconds = sum(float(number) * _SECONDS_BY_UNIT[unit] for number, unit in _PART.findall(parts))
    return -seconds if sign == "-" else seconds


def format_duration(seconds: float) -> str:
    """Return the shortest usual form, to the millisecond."""
    milliseconds = round(abs(seconds) * 1000)
    text = ""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, milliseconds = divmod(milliseconds, size)
        text += f"{count}{unit}" if count else ""
    return ("-" if seconds < 0 and text else "") + (text or "0")
