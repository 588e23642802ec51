"""Whether a server of MongoDB will do: its version, and what it is a part of. Pure.

What it says of itself (hello, buildInfo), which needs no right, is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_LEAST_VERSION: Final = (7, 0)


def refusal(hello: Mapping[str, Any], build_info: Mapping[str, Any]) -> str:
    """Return why a server will never do; empty: it will."""
    version = tuple(int(part) for part in build_info.get("versionArray", ())[:2])
    if version < _LEAST_VERSION:
        shown = build_info.get("version", "unknown")
        return f"its version is {shown}: MongoDB 7.0 or later is needed"
    is_mongos = hello.get("msg") == "isdbgrid"
    if not is_mongos and not hello.get("setName"):
        return (
            "it stands alone, and has no transactions: start it with --replSet, and run rs.initiate(); "
            "one member is enough to try"
        )
    return ""
