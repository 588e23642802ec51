"""The curves of a bench as pictures; needs matplotlib, the extra `bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from results import Curve

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("plots need matplotlib: pip install 'mnemosyned[bench]'")


def draw(curves: Sequence[Curve], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for curve in curves:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, points in curve.points.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=curve.x, ylabel=curve.y, title=curve.name)
        if curve.is_log:
            axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(directory / f"{curve.name.replace(' ', '-')}.svg")
