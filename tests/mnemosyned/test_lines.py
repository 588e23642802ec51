from __future__ import annotations

from mnemosyned.observe.lines import LINES_A_SECOND, LineBudget


def test_lines_beyond_the_budget_are_left_out_and_told_in_the_next_second() -> None:
    budget = LineBudget()

    assert [budget.take(10.0) for _ in range(LINES_A_SECOND)] == [0] * LINES_A_SECOND
    assert [budget.take(10.9) for _ in range(3)] == [None] * 3
    assert budget.take(11.0) == 3
    assert budget.take(11.1) == 0
