"""Large clusters: what is quick for a few members must be quick for thousands."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulation.large import CHANGES, change_some
from simulation.world import World

SIMULATE = Path(__file__).parents[1] / "bench" / "simulate.py"


@pytest.mark.slow
def test_a_thousand_nodes_live_for_a_minute_in_twenty_seconds_and_agree() -> None:
    began_s = time.process_time()
    world = World(1)
    world.checks_invariants = False
    known_s = change_some(world, nodes=1000, seconds=60.0)

    assert time.process_time() - began_s < 20.0
    assert world.is_converged()
    assert known_s.keys() == set(CHANGES)
    assert max(known_s["crashed"], known_s["joined"]) < 2.0
    # An idle one sends two, and answers: the changes themselves take little.
    assert world.packets / 1000 / 60.0 < 5.0


@pytest.mark.parametrize(("arguments", "code", "said"), [(["-n", "20"], 0, "20 nodes"), (["-n", "3"], 2, "")])
def test_the_command_tells_what_it_saw(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SIMULATE), *arguments], capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert "Traceback" not in done.stderr
