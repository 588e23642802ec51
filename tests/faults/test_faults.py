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
# A run takes 20 s: `make test` has one that ends a process, and one that cuts the way to the storage.
FIRST_KINDS: Final = (FaultKind.KILL, FaultKind.STORAGE_CUT)
KINDS: Final = [
    pytest.param(kind, id=kind.value, marks=() if kind in FIRST_KINDS else pytest.mark.slow)
    for kind in CI_KINDS
]
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


@pytest.mark.parametrize("kind", KINDS)
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
