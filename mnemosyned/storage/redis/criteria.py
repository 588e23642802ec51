"""The criteria of List and Delete, as scripts take them. Pure."""

from __future__ import annotations

from mnemosyned.sessions.model import Criteria
from mnemosyned.storage.redis.records import stored_name


def texts_of(criteria: Criteria) -> list[str | bytes | int]:
    """Return the criteria as `scripts/criteria.lua` takes them."""
    texts: list[str | bytes | int] = []
    for value in (criteria.access_token, criteria.subject_id, criteria.refresh_token):
        texts += ("", "") if value is None else ("1", stored_name(value))
    for instant_us in (criteria.expires_after_us, criteria.expires_before_us):
        texts.append("" if instant_us is None else instant_us)
    return texts
