"""Runs attacks one after the other, each on daemons of its own, and prints what came of them."""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import asyncpg
import grpc
from redteam import (  # noqa: F401  # each registers its attacks
    damaged_rows,
    files,
    floods,
    guessing,
    hoarders,
    impostors,
    logging_attacks,
    messages,
    paths,
    replays,
    strangers,
)
from redteam.lab import ATTACKS, ENGINES, MAX_P99_MS, Attack, Broken, Lab, Outcome, code_of

from mnemosyned.embedded.server import EmbeddedPostgres


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    attack: Attack
    engine: str
    outcome: Outcome
    seconds: float


def selected(
    words: Sequence[str] = (), engines: Sequence[str] = ENGINES, *, is_short: bool = False
) -> list[tuple[Attack, str]]:
    """Return the attacks that have one of the words, each with the engines to run it on."""
    return [
        (one, engine)
        for one in ATTACKS
        if not words or any(word in f"{one.kind} {one.name}" for word in words)
        for engine in engines
        if engine in (one.quick_on if is_short else one.engines)
    ]


class Laboratory:
    """A PostgreSQL and a directory for all attacks of a run."""

    def __init__(self, *, least_s: float = 3.0) -> None:
        """See Lab for `least_s`."""
        self._least_s = least_s
        self._server: EmbeddedPostgres | None = None  # started when an attack needs it
        self._stack = ExitStack()
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        # A daemon that is started as another user reads its files here.
        self._scratch.chmod(0o755)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]  # as it came

    def run(self, attacks: Sequence[tuple[Attack, str]]) -> list[Row]:
        """Run each attack on its engine; print each line when it is known."""
        rows: list[Row] = []
        print(_HEAD, flush=True)
        for attack, engine in attacks:
            began_s = time.monotonic()
            outcome = self.outcome(attack, engine)
            row = Row(attack=attack, engine=engine, outcome=outcome, seconds=time.monotonic() - began_s)
            rows.append(row)
            print(_line(row), flush=True)
        return rows

    def outcome(self, attack: Attack, engine: str) -> Outcome:
        """Run one attack; once more if the machine may have been too slow for the good client."""
        if lacking := attack.needs():
            return Outcome(verdict="skipped", reasons=[lacking])
        outcome = self._outcome_once(attack, engine)
        if outcome.verdict == "broken" and _is_slow_alone(outcome):
            outcome = self._outcome_once(attack, engine)
        return outcome

    def _outcome_once(self, attack: Attack, engine: str) -> Outcome:
        scratch = self._scratch / str(next(self._numbers))
        scratch.mkdir()
        with Lab(engine, self._new_database, scratch, least_s=self._least_s) as lab:
            try:
                attack.run(lab)
            except Broken as exc:
                return lab.outcome(verdict="broken", reason=str(exc))
            except grpc.RpcError as exc:
                text = f"an honest call failed: {code_of(exc).name} {exc}"
                return lab.outcome(verdict="broken", reason=text.replace("\n", " "))
            except (ConnectionRefusedError, TimeoutError):
                return lab.outcome(verdict="broken", reason="a port of a daemon does not answer")
            except (AssertionError, OSError) as exc:
                # Void, or what the tests' own helpers say when a daemon does not start.
                return lab.outcome(verdict="void", reason=f"{type(exc).__name__}: {exc}")
            return lab.outcome()

    def _new_database(self) -> str:
        if self._server is None:
            self._server = self._stack.enter_context(EmbeddedPostgres.start(self._scratch / "postgres"))
        name = f"redteam_{next(self._numbers)}"
        asyncio.run(_execute(self._server.dsn, f"CREATE DATABASE {name}"))
        return f"{self._server.dsn.rpartition('/')[0]}/{name}"


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement)
    await connection.close()


def _is_slow_alone(outcome: Outcome) -> bool:
    return len(outcome.reasons) == 1 and outcome.p99_ms >= MAX_P99_MS and "p99" in outcome.reasons[0]


_HEAD = f"{'attack':76} {'engine':7} {'verdict':8} {'p99 ms':>7} {'failed':>7} {'RSS MB':>7} {'s':>5}"


def _line(row: Row) -> str:
    outcome = row.outcome
    name = f"{row.attack.kind}: {row.attack.name}"
    line = f"{name[:76]:76} {row.engine:7} {outcome.verdict:8} {outcome.p99_ms:7.1f}"
    line += f" {outcome.failed:7} {outcome.rss_mb:7} {row.seconds:5.1f}"
    return "\n".join([line, *(f"    {reason[:400]}" for reason in outcome.reasons)])


def print_table(rows: Sequence[Row]) -> int:
    """Print the sums; return the exit code."""
    counts = dict.fromkeys(("held", "broken", "void", "skipped"), 0)
    for row in rows:
        counts[row.outcome.verdict] += 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.stdout.flush()
    return 1 if counts["broken"] or counts["void"] else 0
