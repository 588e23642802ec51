"""What the log of a daemon may hold, whatever strangers have sent."""

from __future__ import annotations

import unicodedata

from processes import Daemon
from redteam.lab import require

INJECTED = "INJECTED"


def check(daemon: Daemon) -> None:
    """Require that no line has a control or format character, and that none begins with a stranger's text."""
    for line in list(daemon.lines):
        text = line.removesuffix("\n")
        bad = {f"U+{ord(character):04X}" for character in text if _is_bad(character)}
        require(not bad, f"the log has {sorted(bad)}: {text[:200]!r}")
        require(not text.lstrip().startswith(INJECTED), f"a stranger's line in the log: {text[:200]!r}")


def _is_bad(character: str) -> bool:
    return character != "\t" and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")
