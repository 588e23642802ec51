"""What a row has measured, beside its limit and its goal; as lines and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Result:
    """One number, once a round; `limits` is what it is compared with, of the same rounds.

    The goal is of the ratio where there are limits, and of the value where there are none.
    """

    name: str
    unit: str
    values: list[float]
    limit: str = ""  # what `limits` are
    limits: list[float] = field(default_factory=list)
    goal: float | None = None
    is_more_better: bool = False
    note: str = ""

    @property
    def judged(self) -> list[float]:
        """What the goal is about."""
        if not self.limits:
            return self.values
        return [value / limit for value, limit in zip(self.values, self.limits, strict=True)]

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps to the goal; None: there is no goal."""
        if self.goal is None:
            return None
        found = statistics.median(self.judged)
        return found >= self.goal if self.is_more_better else found <= self.goal

    @property
    def line(self) -> str:
        """The result for people."""
        mark = {True: "✓", False: "✗", None: " "}[self.is_met]
        text = f"{mark} {self.name:44} {_spread(self.values)} {self.unit}"
        if self.limits:
            text += f"; {_spread(self.judged)} x {self.limit} ({statistics.median(self.limits):.4g})"
        if self.goal is not None:
            text += f"; goal {'≥' if self.is_more_better else '≤'} {self.goal:g}"
        return text + (f"; {self.note}" if self.note else "")

    def as_json(self) -> dict[str, Any]:
        """Return it for build/bench.json."""
        return asdict(self) | {"median": statistics.median(self.values), "is_met": self.is_met}


@dataclass(kw_only=True)
class Curve:
    """Points for a plot of docs/performance.md."""

    name: str
    x: str
    y: str
    points: dict[str, list[tuple[float, float]]]  # by the name of the line
    is_log: bool = False


class Skipped(Exception):
    """A row cannot run here; the text says why."""


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.4g} ({ordered[0]:.4g} to {ordered[-1]:.4g})"
