"""Runs a schedule under load, judges what the clients saw, and counts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from faults.checker import LATE_BY_S, Finding, check
from faults.history import Kind, Operation, Outcome
from faults.laboratory import CLOCKS, Disturbance, Laboratory, Variant
from faults.recorder import Recorder
from faults.schedules import Fault, FaultKind, schedule

# Of the session of the first anomaly of each kind: the calls before and after it.
_SHOWN_BEFORE: Final = 25
_SHOWN_AFTER: Final = 5
# What a look at the metrics of all nodes may take.
_LOOK_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a run follows from."""

    seed: int
    kinds: tuple[FaultKind, ...]
    seconds: float = 12.0
    variant: Variant = field(default_factory=Variant)
    is_mixed: bool = False
    rate: float = 250.0
    # A node is called at once when it listens, or once it says that it serves, as a balancer would.
    is_patient: bool = False

    @property
    def faults(self) -> list[Fault]:
        """The schedule."""
        return schedule(
            self.seed, self.kinds, nodes=self.variant.nodes, seconds=self.seconds, is_mixed=self.is_mixed
        )

    @property
    def words(self) -> list[str]:
        """The arguments that run the same schedule again."""
        words = [f"--seed={self.seed}", f"--seconds={self.seconds:g}", f"--nodes={self.variant.nodes}"]
        words.append(f"--kinds={','.join(kind.value for kind in self.kinds)}")
        words.append(f"--rate={self.rate:g}")
        words += ["--mixed"] * self.is_mixed + ["--patient"] * self.is_patient
        words += ["--tls"] * self.variant.has_tls
        words += [f"--storage={self.variant.storage}"] * (self.variant.storage != "postgres")
        words += ["--hmac"] * self.variant.has_hmac + [f"--engine={self.variant.engine}"]
        words += [f"--flag={flag}" for flag in self.variant.flags]
        return words

    @property
    def command(self) -> str:
        """What runs the same schedule again, for people."""
        return f"make faults ARGS='{' '.join(self.words)}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to."""

    plan: Plan
    since_s: float
    operations: list[Operation]
    findings: list[Finding]
    disturbances: list[Disturbance]
    spans: list[tuple[float, float]]
    mirror_hits: int  # before the first fault, or of the processes that are there at the end
    is_whole: bool

    @property
    def summary(self) -> str:
        """One line of counts."""
        anomalies = Counter(finding.anomaly.value for finding in self.findings)
        oldest_s = max((finding.age_s for finding in self.findings), default=0.0)
        failed = [one for one in self.operations if one.outcome in {Outcome.MAYBE, Outcome.UNSENT}]
        kinds = Counter(one.error.partition(" ")[0] for one in failed)
        needless = sum(self._is_needless(one) for one in failed)
        found = f"{_counts(anomalies)} (up to {oldest_s:.1f} s)" if anomalies else "none"
        return (
            f"{len(self.operations)} calls, {len(failed)} failed ({_counts(kinds)}; {needless} needless); "
            f"{self.mirror_hits} answered by mirrors; "
            f"Abandon {self._latency(is_in_fault=False)} when all is well, "
            f"{self._latency(is_in_fault=True)} in faults; "
            f"{'' if self.is_whole else 'NOT WHOLE AGAIN; '}anomalies: {found}"
        )

    @property
    def report(self) -> str:
        """All that is needed to understand and repeat a run: the schedule, the counts and the histories."""
        lines = [self.plan.command, *(str(fault) for fault in self.plan.faults), self.summary]
        first_by_anomaly = {finding.anomaly: finding for finding in reversed(self.findings)}
        for finding in first_by_anomaly.values():
            lines += self._told(finding)
        return "\n".join(lines)

    @property
    def needless(self) -> list[Operation]:
        """Calls that failed while the node that was asked, and the storage, were well."""
        return [
            one
            for one in self.operations
            if one.outcome in {Outcome.MAYBE, Outcome.UNSENT} and self._is_needless(one)
        ]

    def _is_needless(self, one: Operation) -> bool:
        return not any(
            disturbance.node in {"", one.node}
            and one.ended_s >= disturbance.began_s
            and one.began_s <= disturbance.ended_s
            for disturbance in self.disturbances
        )

    def _latency(self, *, is_in_fault: bool) -> str:
        took_ms = sorted(
            1000 * (one.ended_s - one.began_s)
            for one in self.operations
            if one.kind is Kind.ABANDON
            and any(one.ended_s >= began_s and one.began_s <= ended_s for began_s, ended_s in self.spans)
            == is_in_fault
        )
        if not took_ms:
            return "-"
        p99_ms = took_ms[min(len(took_ms) - 1, int(0.99 * len(took_ms)))]
        return f"p50 {took_ms[len(took_ms) // 2]:.0f} p99 {p99_ms:.0f} ms"

    def _told(self, finding: Finding) -> list[str]:
        seen = finding.seen
        history = sorted(
            (one for one in self.operations if one.token == seen.token), key=lambda one: one.began_s
        )
        place = history.index(seen)
        marks = {id(finding.cause): "!", id(seen): ">", id(finding.against): "*"}
        shown = [
            one
            for number, one in enumerate(history)
            if place - _SHOWN_BEFORE <= number <= place + _SHOWN_AFTER or id(one) in marks
        ]
        return [
            f"{finding.anomaly.value}, {finding.age_s:.3f} s after the acknowledgement (*); (!) did it:",
            *(f"{marks.get(id(one), ' ')} {one.line(self.since_s)}" for one in shown),
        ]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {word}" for word, number in counter.most_common()) or "none"


def run(plan: Plan, directory: Path, *, logs: Path | None = None) -> Result:
    """Do what the plan says in a laboratory of its own; leave what the daemons logged in `logs`."""
    has_fake_clocks = bool(CLOCKS & set(plan.kinds))
    with Laboratory(directory, plan.variant, has_fake_clocks=has_fake_clocks) as laboratory:
        result = asyncio.run(_run(plan, laboratory))
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            for name, daemon in laboratory.cluster.daemons.items():
                (logs / f"{plan.seed}-{name.partition(':')[0]}.log").write_text(daemon.log)
        return result


async def _run(plan: Plan, laboratory: Laboratory) -> Result:
    await laboratory.whole()
    avoided = laboratory.starting if plan.is_patient else frozenset()
    recorder = Recorder(seed=plan.seed, rate=plan.rate, avoided=avoided)
    for name in laboratory.names:
        recorder.add(name, laboratory.address(name), laboratory.credentials)
    since_s = time.monotonic()
    async with recorder:
        early_hits = await _before_faults(plan, laboratory, since_s)
        await _perform(plan, laboratory, since_s)
        await _sleep_until(since_s + plan.seconds)
        await recorder.stop()
        is_whole = await _settled(laboratory)
        # A failed call may be done until its deadline.
        await _sleep_until(max((one.deadline_s for one in recorder.operations), default=0.0) + LATE_BY_S)
        await recorder.look_at_all(laboratory.names)
    return Result(
        plan=plan,
        since_s=since_s,
        operations=recorder.operations,
        findings=await asyncio.to_thread(check, recorder.operations),
        disturbances=laboratory.disturbances,
        spans=laboratory.spans,
        mirror_hits=max(early_hits, await asyncio.to_thread(laboratory.mirror_hits)),
        is_whole=is_whole,
    )


async def _before_faults(plan: Plan, laboratory: Laboratory, since_s: float) -> int:
    await _sleep_until(since_s + plan.faults[0].at_s - _LOOK_S)
    return await asyncio.to_thread(laboratory.mirror_hits)


async def _perform(plan: Plan, laboratory: Laboratory, since_s: float) -> None:
    async with asyncio.TaskGroup() as group:
        for fault in plan.faults:
            await _sleep_until(since_s + fault.at_s)
            if time.monotonic() > since_s + plan.seconds:
                return
            if plan.is_mixed:
                group.create_task(laboratory.perform(fault))
            else:
                await laboratory.perform(fault)


async def _settled(laboratory: Laboratory) -> bool:
    try:
        await laboratory.whole()
    except AssertionError:
        return False
    return True


async def _sleep_until(instant_s: float) -> None:
    await asyncio.sleep(max(0.0, instant_s - time.monotonic()))
