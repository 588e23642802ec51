from __future__ import annotations

import pytest

from cluster.identity import PROTOCOL, Identity

OURS = Identity(label="ours", storage_fingerprint=b"f")


def test_nodes_with_the_same_label_and_storage_belong_together() -> None:
    same = Identity(label="ours", storage_fingerprint=b"f")

    assert OURS.objection(same.message()) == ""
    assert same.message().protocol == PROTOCOL


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (Identity(label="x" * 500, storage_fingerprint=b"f"), f"'{'x' * 100}' on the other"),
        (Identity(label="ours", storage_fingerprint=b"g"), "different tables or databases"),
    ],
)
def test_a_node_of_another_cluster_or_storage_is_refused(theirs: Identity, text: str) -> None:
    assert OURS.objection(theirs.message()).endswith(text)


def test_a_call_is_answered_by_the_node_that_it_names() -> None:
    assert OURS.objection_to_call(OURS.message("a:1"), "a:1") == ""


@pytest.mark.parametrize(("callee", "shown"), [("b:1", "b:1"), ("", "no node"), ("x" * 500, "x" * 100)])
def test_a_call_for_another_node_is_refused(callee: str, shown: str) -> None:
    text = OURS.objection_to_call(OURS.message(callee), "a:1")

    assert text == f"this node is a:1, and the call is for {shown}"


def test_a_call_of_another_cluster_is_refused_by_the_node_that_it_names() -> None:
    theirs = Identity(label="theirs", storage_fingerprint=b"f")

    assert "label" in OURS.objection_to_call(theirs.message("a:1"), "a:1")
