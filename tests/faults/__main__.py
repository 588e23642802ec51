"""Breaks a cluster under load, and judges what its clients saw: `make faults ARGS='--kinds=part'`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from clocks import IS_POSSIBLE as HAS_CLOCKS
from faults.laboratory import CLOCKS, Variant
from faults.runner import Plan, run
from faults.schedules import FaultKind
from faults.storages import STORAGES, AnyStorage
from networks import IS_POSSIBLE


def main() -> int:
    arguments = parsed(sys.argv[1:])
    if not IS_POSSIBLE:
        raise SystemExit("this needs root, ip and nft")
    totals: dict[str, Counter[str]] = {}
    for name, plan in plans(arguments):
        print(f"== {name}: {plan.command}", flush=True)
        if arguments.verbose:
            print("\n".join(map(str, plan.faults)), flush=True)
        with tempfile.TemporaryDirectory() as directory:
            # PostgreSQL runs as another user.
            Path(directory).chmod(0o755)
            result = run(plan, Path(directory) / "laboratory", logs=arguments.logs)
        print(result.report if result.findings or not result.is_whole else result.summary, flush=True)
        total = totals.setdefault(name, Counter())
        total.update(finding.anomaly.value for finding in result.findings)
        total.update({"calls": len(result.operations), "needless": len(result.needless), "runs": 1})
        total.update({"runs with anomalies": bool(result.findings)})
        if arguments.needless:
            print(Counter(f"{one.node} {one.kind.value} {one.error}" for one in result.needless))
    for name, total in totals.items():
        print(f"{name:<16} {dict(total)}")
    return int(any(total["runs with anomalies"] for total in totals.values()))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    kinds = [kind.value for kind in FaultKind]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each kind, with this and the next seeds"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of load in each run")
    parser.add_argument(
        "--kinds",
        default="all",
        help=f"of {', '.join(kinds)}, comma-separated; all: each in runs of its own, and then all mixed",
    )
    parser.add_argument("--mixed", action="store_true", help="these kinds together in each run, overlapping")
    parser.add_argument("--nodes", type=int, choices=(3, 5), default=3)
    parser.add_argument("--engine", choices=("h2", "grpcio"), default="h2")
    parser.add_argument("--tls", action="store_true", help="between nodes, and for clients")
    parser.add_argument("--storage", choices=tuple(STORAGES), default="postgres")
    parser.add_argument("--hmac", action="store_true", help="hash the tokens at rest")
    parser.add_argument("--flag", action="append", default=[], help="another flag of the daemons")
    parser.add_argument("--rate", type=float, default=250.0, help="calls a second, without those that follow")
    parser.add_argument("--patient", action="store_true", help="call a started node only once it serves")
    parser.add_argument("--needless", action="store_true", help="tell the needless failures by kind")
    parser.add_argument("--logs", type=Path, help="directory for the logs of the nodes")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every schedule")
    return parser.parse_args(words)


def plans(arguments: argparse.Namespace) -> Iterator[tuple[str, Plan]]:
    variant = Variant(
        nodes=arguments.nodes,
        engine=arguments.engine,
        has_tls=arguments.tls,
        has_hmac=arguments.hmac,
        storage=arguments.storage,
        flags=tuple(arguments.flag),
    )
    possible = [kind for kind in FaultKind if _is_possible(kind, STORAGES[arguments.storage])]
    is_all = arguments.kinds == "all"
    chosen = possible if is_all else [FaultKind(word) for word in arguments.kinds.split(",")]
    if not set(chosen) <= set(possible):
        raise SystemExit(
            "clocks that step need Debian's package faketime, a failover a copy of the storage, "
            "and a slow link a storage that nodes reach through a relay"
        )
    groups = [] if arguments.mixed else [(kind,) for kind in chosen]
    mixes = [tuple(chosen)] if arguments.mixed or is_all else []
    for group in (*groups, *mixes):
        is_mixed = group in mixes
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            plan = Plan(
                seed=seed,
                kinds=group,
                seconds=arguments.seconds,
                variant=variant,
                is_mixed=is_mixed,
                rate=arguments.rate,
                is_patient=arguments.patient,
            )
            yield ("mixed" if is_mixed else group[0].value), plan


def _is_possible(kind: FaultKind, storage: type[AnyStorage]) -> bool:
    if kind in CLOCKS:
        return HAS_CLOCKS
    if kind is FaultKind.FAILOVER:
        return storage.has_copy
    # Where nodes have no relay to the storage, nothing between them could be slow.
    return kind is not FaultKind.SLOW or not storage.is_direct


if __name__ == "__main__":
    sys.exit(main())
