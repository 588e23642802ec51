"""Short runs of the laboratory; `make faults` has the long ones, and all kinds of faults.

No clock of a test can prove that a promise holds whatever fails. These runs find what breaks it often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from faults.laboratory import Variant
from faults.runner import Plan, Result, run
from faults.schedules import FaultKind
from networks import IS_POSSIBLE
from redis_servers import needs_redis

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(not IS_POSSIBLE, reason="network namespaces need root, ip and nft"),
]
# Some of each sort: processes, hosts, networks, storages.
CI_KINDS: Final = (
    FaultKind.KILL,
    FaultKind.STOP,
    FaultKind.PART,
    FaultKind.ONE_WAY,
    FaultKind.STORAGE_CUT,
    FaultKind.STORAGE_RESTART,
    FaultKind.ROLLING,
)
# A process, a network and a storage; `make test-all` has the others of CI_KINDS.
FIRST: Final = (FaultKind.KILL, FaultKind.PART, FaultKind.STORAGE_CUT)
OTHERS: Final = tuple(kind for kind in CI_KINDS if kind not in FIRST)
VARIANTS: Final = {
    "five nodes with hashed tokens": Variant(nodes=5, has_hmac=True),
    "grpcio with TLS": Variant(engine="grpcio", has_tls=True),
}
REDIS_KINDS: Final = (
    FaultKind.KILL,
    FaultKind.PART,
    FaultKind.STORAGE_CUT,
    FaultKind.STORAGE_RESTART,
    FaultKind.FAILOVER,
)


@pytest.mark.parametrize(
    "kind",
    [*FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)],
    ids=lambda kind: kind.value,
)
def test_what_was_acknowledged_stays_so_whatever_fails(kind: FaultKind, tmp_path: Path) -> None:
    result = judge(Plan(seed=1, kinds=(kind,), is_patient=True), tmp_path)

    if kind is FaultKind.STORAGE_CUT:
        # The other nodes answer in the place of the one that is cut off. Alone, none fails. Beside other
        # tests, a call with a deadline of a second may wait that long for a processor.
        assert len(result.needless) <= len(result.operations) / 1000, result.report


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_was_acknowledged_stays_so_in_every_variant(variant: Variant, tmp_path: Path) -> None:
    judge(Plan(seed=2, kinds=CI_KINDS, variant=variant, rate=150.0, is_patient=True), tmp_path)


@pytest.mark.slow
@needs_redis
def test_what_was_acknowledged_stays_so_on_redis_whose_replica_confirms_it(tmp_path: Path) -> None:
    judge(Plan(seed=1, kinds=REDIS_KINDS, variant=Variant(storage="redis"), is_patient=True), tmp_path)


def judge(plan: Plan, directory: Path) -> Result:
    result = run(plan, directory)
    if result.findings or not result.is_whole:
        pytest.fail(result.report, pytrace=False)
    assert result.mirror_hits > 0
    return result
