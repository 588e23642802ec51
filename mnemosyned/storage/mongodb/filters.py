"""Which documents a List, a Delete or a walk is about. Pure."""

from __future__ import annotations

from typing import Any

from bson import Int64

from mnemosyned.sessions.model import Criteria

# Of all sessions: an _id that is no string is none.
EVERYTHING: dict[str, Any] = {"_id": {"$gte": ""}}


def matching(criteria: Criteria) -> dict[str, Any]:
    """Return the filter of what meets all criteria, expired or not.

    Its indexes: the subject's or the refresh token's, each with _id behind it, or that of expiries.
    """
    found: dict[str, Any] = dict(EVERYTHING)
    if criteria.access_token is not None:
        found["_id"] = {"$eq": criteria.access_token}
    if criteria.subject_id is not None:
        found["s"] = {"$eq": criteria.subject_id}
    if criteria.refresh_token is not None:
        found["r"] = {"$eq": criteria.refresh_token}
    expiry: dict[str, Any] = {}
    if criteria.expires_after_us is not None:
        expiry["$gt"] = Int64(criteria.expires_after_us)
    if criteria.expires_before_us is not None:
        expiry["$lt"] = Int64(criteria.expires_before_us)
    if expiry:
        found["e"] = expiry
    return found


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the filter of what two filters have in common."""
    return {"$and": [one, other]}
