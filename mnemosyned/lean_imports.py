"""Imports libraries without the optional parts that they load only because these are installed.

aiocache loads redis for a backend that the daemon does not use, and structlog loads rich for a form of
tracebacks that it does not use. Both halves of an import time that is 0.3 s with them and 0.2 s without.
A module that Python has marked with None in `sys.modules` counts as not installed (import system, "The module
cache" in the language reference); the mark is taken away again, so that the engine that needs redis can
import it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

_UNUSED_BY_LIBRARY: Final = {"aiocache": "redis", "structlog": "rich"}


def load() -> None:
    """Import those libraries; call it before the first module that imports one of them."""
    for library, unused in _UNUSED_BY_LIBRARY.items():
        if library in sys.modules or unused in sys.modules:
            continue
        sys.modules[unused] = None  # type: ignore[assignment]  # as the language reference says
        try:
            importlib.import_module(library)
        finally:
            del sys.modules[unused]
