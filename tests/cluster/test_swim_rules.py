"""The rules for editing that swim.py opens with, as far as its source shows whether they hold."""

from __future__ import annotations

import ast
import inspect

import pytest

from cluster import swim

(SWIM,) = (
    node
    for node in ast.parse(inspect.getsource(swim)).body
    if isinstance(node, ast.ClassDef) and node.name == "Swim"
)


def methods_with(text: str) -> set[str]:
    """Return the methods that have this text in their code."""
    return {
        method.name
        for method in SWIM.body
        if isinstance(method, ast.FunctionDef) and any(text in ast.unparse(line) for line in method.body)
    }


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("self.table.put(", {"_store", "_complete"}),
        ("self.table.forget(", {"_forget"}),
        ("self._store(", {"__init__", "_believe", "_end_suspicions", "_bump_incarnation"}),
        ("self.me = ", {"__init__", "_bump_incarnation"}),
        ("self._updates.put(", {"_spread"}),
        ("self._events.append(", {"_emit"}),
    ],
)
def test_only_the_methods_that_a_rule_names_do_what_it_is_about(text: str, methods: set[str]) -> None:
    assert methods_with(text) == methods


def test_no_set_is_made() -> None:
    nodes = list(ast.walk(SWIM))

    assert not [node for node in nodes if isinstance(node, ast.Set | ast.SetComp)]
    assert not [node for node in nodes if isinstance(node, ast.Name) and node.id in {"set", "frozenset"}]
