"""Sessions written straight into the table: a million take a minute so, and through the daemon ten."""

from __future__ import annotations

import hashlib

import asyncpg
from mnemosynerpc.session_pb2 import Session

from rows.setting import session

# A bag like that of `session`; the table's statistics are those of a table that autovacuum has seen.
_FILL = (
    "INSERT INTO mnemosyne.session (access_token, subject_id, subject_client, bag, expire_at, due_at) "
    "SELECT convert_to({token}, 'UTF8'), 'user:' || n, 'web', $2, at, at "
    "FROM (SELECT n, now() + interval '1 day' + n * interval '1 ms' AS at "
    "FROM generate_series(0, $1 - 1) n) AS made"
)
_IN_SEQUENCE = "to_char(n, 'FM0000000') || repeat('x', 121)"
_AT_RANDOM = "encode(sha512(convert_to(n::text, 'UTF8')), 'hex')"


async def fill_in_sequence(dsn: str, count: int) -> None:
    """Write `count` sessions whose tokens and expiries have one sequence: that of number n is at depth n."""
    await _fill(dsn, count, _IN_SEQUENCE)


async def fill_at_random(dsn: str, count: int) -> None:
    """Write `count` sessions whose tokens are `random_token` of 0 and on."""
    await _fill(dsn, count, _AT_RANDOM)


def random_token(number: int) -> str:
    """Return the token of one of the sessions of `fill_at_random`, 128 digits."""
    return hashlib.sha512(str(number).encode()).hexdigest()


async def _fill(dsn: str, count: int, token: str) -> None:
    bag = bytes(Session(bag=session(0).bag).SerializeToString())
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(_FILL.format(token=token), count, bag, timeout=600)
        await connection.execute("VACUUM ANALYZE mnemosyne.session", timeout=600)
        await connection.execute("CHECKPOINT", timeout=600)
    finally:
        await connection.close()
