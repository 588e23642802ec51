from __future__ import annotations

from itertools import permutations

import pytest

from cluster.member import Member, Phase, State, claim_digest, name_digest, names_digest

ONE = Member("a:1", "10.0.0.1:1", 7, 3, State.ALIVE, Phase.ACTIVE, 42)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (ONE, ONE._replace(state=State.SUSPECT)),
        (ONE._replace(state=State.SUSPECT), ONE._replace(state=State.DEAD)),
        (ONE._replace(state=State.DEAD), ONE._replace(state=State.LEFT)),
        (ONE._replace(state=State.LEFT), ONE._replace(incarnation=4)),
        (ONE._replace(incarnation=99, state=State.LEFT), ONE._replace(generation=8, incarnation=0)),
    ],
)
def test_a_claim_is_newer_by_generation_then_incarnation_then_state(older: Member, newer: Member) -> None:
    assert older.version < newer.version


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("state", State)
def test_only_active_members_that_may_be_alive_own_tokens(phase: Phase, state: State) -> None:
    member = ONE._replace(phase=phase, state=state)

    assert member.is_routable == (phase is Phase.ACTIVE and state in {State.ALIVE, State.SUSPECT})
    assert member.is_gone == (state in {State.DEAD, State.LEFT})


@pytest.mark.parametrize(
    ("phase", "state", "status"),
    [
        (Phase.JOINING, State.ALIVE, "joining"),
        (Phase.ACTIVE, State.ALIVE, "active"),
        (Phase.LEAVING, State.ALIVE, "leaving"),
        (Phase.ACTIVE, State.SUSPECT, "suspect"),
        (Phase.LEAVING, State.DEAD, "dead"),
        (Phase.LEAVING, State.LEFT, "left"),
    ],
)
def test_a_status_is_one_word(phase: Phase, state: State, status: str) -> None:
    assert ONE._replace(phase=phase, state=state).status == status


def test_a_set_of_names_has_one_digest_in_any_order() -> None:
    digests = {names_digest(names) for names in permutations(["a", "b", "c", "d"])}

    assert len(digests) == 1
    assert digests != {names_digest(["a", "b", "c"])}
    assert names_digest([]) == 0
    assert names_digest(["a"]) == name_digest("a") < 2**64


@pytest.mark.parametrize(
    "changed",
    [{"name": "b"}, {"address": "b"}, {"generation": 8}, {"incarnation": 4}, {"phase": Phase.LEAVING}],
)
def test_the_digest_of_a_claim_changes_with_all_that_nodes_must_agree_on(changed: dict[str, object]) -> None:
    assert claim_digest(ONE) != claim_digest(ONE._replace(**changed))  # type: ignore[arg-type]


def test_the_digest_of_a_suspect_is_that_of_the_living() -> None:
    assert claim_digest(ONE) == claim_digest(ONE._replace(state=State.SUSPECT))
