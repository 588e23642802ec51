"""Schedules follow from their seeds."""

from __future__ import annotations

import itertools

import pytest
from faults.__main__ import parsed, plans
from faults.laboratory import Variant
from faults.runner import Plan
from faults.schedules import FaultKind, schedule

ALL = list(FaultKind)


def test_a_seed_gives_the_same_schedule_again() -> None:
    assert schedule(7, ALL, nodes=5, seconds=60) == schedule(7, ALL, nodes=5, seconds=60)


def test_another_seed_gives_another_schedule() -> None:
    assert schedule(7, ALL, nodes=5, seconds=60) != schedule(8, ALL, nodes=5, seconds=60)


@pytest.mark.parametrize("kind", ALL, ids=[kind.value for kind in ALL])
@pytest.mark.parametrize("nodes", [3, 5])
def test_every_kind_fits_into_a_short_run(kind: FaultKind, nodes: int) -> None:
    for seed in range(50):
        faults = schedule(seed, [kind], nodes=nodes, seconds=12)
        assert faults
        assert all(fault.at_s < 12 for fault in faults)
        assert all(set(fault.nodes) | set(fault.others) <= set(range(nodes)) for fault in faults)
        assert all(not set(fault.nodes) & set(fault.others) for fault in faults)


def test_mixed_faults_overlap() -> None:
    faults = schedule(1, [FaultKind.PART], nodes=3, seconds=60, is_mixed=True)

    assert any(before.at_s + before.lasts_s > after.at_s for before, after in itertools.pairwise(faults))


def test_a_storage_without_a_copy_is_never_replaced_by_one() -> None:
    kinds = {kind for _, plan in plans(parsed(["--storage=mongodb"])) for kind in plan.kinds}

    assert FaultKind.STORAGE_RESTART in kinds
    assert FaultKind.FAILOVER not in kinds
    with pytest.raises(SystemExit, match="a failover a copy of the storage"):
        list(plans(parsed(["--storage=mongodb", "--kinds=failover"])))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(seed=3, kinds=(FaultKind.PART,)),
        Plan(seed=4, kinds=(FaultKind.KILL, FaultKind.STOP), is_mixed=True, is_patient=True, seconds=7.5),
        Plan(
            seed=5,
            kinds=(FaultKind.LOSSY,),
            rate=99,
            variant=Variant(
                nodes=5,
                engine="grpcio",
                has_tls=True,
                has_hmac=True,
                storage="redis",
                flags=("-cache.ttl=1h", "-grpc.debug"),
            ),
        ),
    ],
    ids=["plain", "mixed", "variant"],
)
def test_the_command_that_a_run_prints_repeats_it(plan: Plan) -> None:
    ((_, again),) = plans(parsed(plan.words))

    assert again == plan
    assert again.faults == plan.faults
