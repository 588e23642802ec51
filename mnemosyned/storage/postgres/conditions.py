"""The criteria of List and Delete as conditions of SQL. Pure."""

from __future__ import annotations

from mnemosyned.sessions.model import Criteria
from mnemosyned.storage.postgres.columns import UNINDEXED


def condition(criteria: Criteria, *, is_indexed: bool = True) -> tuple[str, list[object]]:
    """Return an SQL condition with parameters from $1 on, and their values.

    `is_indexed`: the table has an index on `expire_at`, which serves criteria without another index. The
    texts are constants, so there are at most 32 different conditions for asyncpg to prepare.
    """
    expiry = "expire_at" if is_indexed and not is_keyed(criteria) else f"expire_at{UNINDEXED}"
    value_by_condition: dict[str, object] = {
        "access_token =": _encoded(criteria.access_token),
        "refresh_token =": _encoded(criteria.refresh_token),
        "subject_id =": criteria.subject_id,
        f"{expiry} >": criteria.expires_after_us,
        f"{expiry} <": criteria.expires_before_us,
    }
    given = [(text, value) for text, value in value_by_condition.items() if value is not None]
    conditions = [f"{text} ${number}" for number, (text, _) in enumerate(given, start=1)]
    return " AND ".join(conditions) or "TRUE", [value for _, value in given]


def is_keyed(criteria: Criteria) -> bool:
    """Tell whether a criterion has an index that finds fewer sessions than that of expiries."""
    keys = (criteria.access_token, criteria.refresh_token, criteria.subject_id)
    return any(key is not None for key in keys)


def _encoded(token: str | None) -> bytes | None:
    return None if token is None else token.encode()
