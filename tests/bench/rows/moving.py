"""`mnemosyned export` and `import`, from PostgreSQL to Redis and back, as users run them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import asyncpg
from redis_servers import programs
from results import Result, Skipped

from mnemosyned.sessions import bag
from rows.setting import Bench, session

# Keys as those of generated tokens: in no sequence.
FILL = (
    "INSERT INTO mnemosyne.session (access_token, subject_id, subject_client, bag, expire_at, due_at) "
    "SELECT convert_to(encode(sha512(n::text::bytea), 'hex'), 'UTF8'), 'user:' || n, 'web', $2, at, at "
    "FROM (SELECT n, now() + interval '1 day' + n * interval '1 us' AS at "
    "FROM generate_series(1, $1) n) AS made"
)


def there_and_back(bench: Bench) -> Iterator[Result]:
    """100,000 sessions from PostgreSQL to Redis and back; each import twice, and the most memory of all."""
    if not programs():
        raise Skipped("it needs redis-server")
    count = bench.scaled(100_000)
    postgres = ["-storage=postgres", f"-postgres.address={bench.postgres()}"]
    redis = ["-storage=redis", f"-redis.address={bench.redis().url}"]
    _seconds("check", *postgres)
    asyncio.run(_fill(postgres[1].partition("=")[2], count))
    rates: dict[str, list[float]] = {}
    peaks_mb: list[float] = []
    for turn in range(bench.rounds):
        there = [*redis, f"-redis.prefix=round{turn}:"]
        back = [*postgres, f"-postgres.table=round{turn}"]
        out, home = (f"{bench.directory}/{name}{turn}" for name in ("out", "home"))
        again = ("-existing=replace", "-prune")
        steps: dict[str, Sequence[str]] = {
            "export from PostgreSQL": ("export", *postgres, f"-output={out}"),
            "import into Redis": ("import", *there, f"-input={out}"),
            "import into Redis again, nothing new": ("import", *there, f"-input={out}", *again),
            "export from Redis": ("export", *there, f"-output={home}"),
            "import into PostgreSQL": ("import", *back, f"-input={home}"),
            "import into PostgreSQL again, nothing new": ("import", *back, f"-input={home}", *again),
        }
        for name, arguments in steps.items():
            took_s, peak_mb = _seconds(*arguments)
            rates.setdefault(name, []).append(count / took_s)
            peaks_mb.append(peak_mb)
    for name, values in rates.items():
        yield Result(name=name, unit="sessions a second", values=values, is_more_better=True)
    yield Result(name="most memory of a command", unit="MB", values=[max(peaks_mb)])


async def _fill(dsn: str, count: int) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(FILL, count, bag.encode(dict(session(0).bag)), timeout=600)
    await connection.execute("VACUUM ANALYZE mnemosyne.session", timeout=600)
    await connection.close()


def _seconds(*arguments: str) -> tuple[float, float]:
    """Run a command; return its time and the most memory that it had, in megabytes."""
    begun_s = time.perf_counter()
    command = [sys.executable, "-m", "mnemosyned", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments[0]
    return time.perf_counter() - begun_s, usage.ru_maxrss / 1024
