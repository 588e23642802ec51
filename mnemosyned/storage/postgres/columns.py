"""How the statements read a row: its columns, whether it is damaged, and whether its session lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mnemosyned.sessions.model import MAX_BAG_BYTES, MAX_CLIENT_BYTES, MAX_INDEXED_BYTES
from mnemosyned.sessions.token import MAX_TOKEN_BYTES

NEW_COLUMNS: Final = "access_token, refresh_token, subject_id, subject_client, bag"
COLUMNS: Final = f"{NEW_COLUMNS}, expire_at"

# What is wrong with a row that is not even read. `octet_length` takes the size from the header of a value, so
# a bag of 500 MB is not fetched from its side table (TOAST). A table that others made may have NULL anywhere.
DAMAGE: Final = (
    "CASE WHEN subject_id IS NULL OR bag IS NULL OR expire_at IS NULL THEN 'a field is missing' "
    f"WHEN octet_length(bag) > {MAX_BAG_BYTES} THEN 'a bag is longer than {MAX_BAG_BYTES} bytes' "
    f"WHEN octet_length(access_token) > {MAX_TOKEN_BYTES} OR octet_length(subject_id) > {MAX_INDEXED_BYTES} "
    f"OR octet_length(refresh_token) > {MAX_INDEXED_BYTES} "
    f"OR octet_length(subject_client) > {MAX_CLIENT_BYTES} THEN 'a field is over its limit' END"
)
# Added to an expiry, it changes nothing, and no index serves the sum.
UNINDEXED: Final = " + interval '0'"
LIVE: Final = f"expire_at{UNINDEXED} > now()"
READABLE_BAG: Final = "CASE WHEN damage IS NULL THEN bag END AS bag"
# One byte more than a token may have: such a key is a damaged row's, and is only named in a log line.
SHORT_KEY: Final = f"substring(access_token FROM 1 FOR {MAX_TOKEN_BYTES + 1}) AS access_token"
# The instant 0 of PostgreSQL, 2000-01-01 UTC, from which it counts microseconds.
POSTGRES_EPOCH_US: Final = 946_684_800_000_000


class Reading:
    """How statements select the columns of a row with `damage`; only its key and its expiry if it has any."""

    def __init__(self, as_bytes: str, expiry: str) -> None:
        """`as_bytes` makes bytes of a text `{}`: those that an answer has. `expiry` is that of List."""
        columns = (
            ("refresh_token", "refresh_token"),
            ("subject_id", as_bytes.format("subject_id")),
            ("subject_client", as_bytes.format("subject_client")),
        )
        self.readable = ", ".join(
            f"CASE WHEN damage IS NULL THEN {value} END AS {column}" for column, value in columns
        )
        # What all statements of List begin with, as `rows.py` reads them.
        self.listed = f"{SHORT_KEY}, {self.readable}, {expiry} AS expiry, damage"


# Eight bytes cost less than a number.
READING: Final = Reading("textsend({})", "timestamptz_send(expire_at)")
# CockroachDB knows the names of these two functions, and refuses to call them.
PLAIN_READING: Final = Reading("convert_to({}, 'UTF8')", "expire_at")


@dataclass(frozen=True, slots=True)
class Query:
    """A statement, and the value of the label `query` under which metrics count it."""

    name: str
    sql: str
