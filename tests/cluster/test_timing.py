"""The inequalities are asserted where the constants stand; here, that each of them can fail."""

from __future__ import annotations

import ast
import inspect
import itertools

import pytest

from cluster import timing

SOURCE = inspect.getsource(timing)
ASSERTS = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.Assert)]
# `TELL_US` is of lease.py, and `TELL_S` made of it.
CONSTANTS = {name: value for name, value in vars(timing).items() if name.isupper() and name != "TELL_US"}


def names_in(check: ast.Assert) -> set[str]:
    return {node.id for node in ast.walk(check) if isinstance(node, ast.Name)} & CONSTANTS.keys()


@pytest.mark.parametrize("check", ASSERTS, ids=lambda check: ast.unparse(check.test))
def test_an_inequality_notices_a_constant_that_is_far_off(check: ast.Assert) -> None:
    code = compile(ast.Expression(check.test), "timing", "eval")
    changed = [
        CONSTANTS | {name: CONSTANTS[name] * factor}
        for name, factor in itertools.product(names_in(check), (0.01, 100))
    ]

    assert eval(code, {}, dict(CONSTANTS))  # noqa: S307  # the project's own source
    assert not all(eval(code, {}, constants) for constants in changed)  # noqa: S307  # the same


def test_every_constant_is_tied_to_another() -> None:
    tied = set().union(*map(names_in, ASSERTS))

    assert CONSTANTS.keys() == tied
