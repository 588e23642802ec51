"""Whether a server of Redis will do: its version, its role, and what it does with sessions. Pure.

What it says of itself (INFO) is enough for all that is refused. CONFIG, which managed servers do not have,
only adds to the warnings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_LEAST_VERSION: Final = (7, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with a server; each text is empty if nothing is."""

    refusal: str = ""  # a retry ends the same way
    unavailable: str = ""  # another server may be meant, or this one later
    warnings: tuple[str, ...] = ()


def fields_of(info: bytes) -> dict[str, str]:
    """Return the answer to INFO by name."""
    lines = info.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def judge(info: Mapping[str, str], settings: Mapping[str, str], *, is_cluster: bool = False) -> Verdict:
    """Judge a server by INFO and CONFIG GET; `settings` is empty if it does not tell."""
    version = tuple(int(part) for part in re.findall(r"\d+", info.get("redis_version", ""))[:2])
    if version and version < _LEAST_VERSION:
        return Verdict(
            refusal=f"its version is {info['redis_version']}: Redis 7.0 or later, or Valkey, is needed"
        )
    if info.get("cluster_enabled") == "1" and not is_cluster:
        return Verdict(refusal="it is a node of a Redis Cluster: write redis+cluster:// in the address")
    if is_cluster and info.get("cluster_enabled", "1") != "1":
        return Verdict(refusal="it is no node of a Redis Cluster: write redis:// in the address")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and info.get("maxmemory", "0") != "0":
        return Verdict(
            refusal=f"its maxmemory-policy is {policy}: it logs users out when its memory is full. "
            "This mends it: CONFIG SET maxmemory-policy noeviction"
        )
    if info.get("role") == "slave" and not is_cluster:
        primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        return Verdict(unavailable=f"the server is a replica of {primary}: name the primary, or Sentinels")
    warnings = [_durability(info, settings)]
    if policy != "noeviction":
        warnings.append(f"maxmemory-policy is {policy}: it would log users out if maxmemory were set")
    return Verdict(warnings=tuple(filter(None, warnings)))


def _durability(info: Mapping[str, str], settings: Mapping[str, str]) -> str:
    if info.get("aof_enabled") == "1":
        if settings.get("appendfsync") == "no":
            return (
                "appendfsync is no: a crash of its machine loses what the system has not written, often 30 s"
            )
        return ""
    if settings.get("save", "?") == "":
        return "appendonly is no and save is empty: its end loses all sessions"
    return "appendonly is no: its end loses all that was written since its last snapshot"
