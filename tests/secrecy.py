"""What no output may hold, and the search for it in every output that a test makes.

The word CANARY is in the passwords, secrets, bags and chosen tokens that helpers of the tests use: put it
into yours. What daemons write, and what the modules log inside the tests' own process, is searched for it
and for what has a form of its own; conftest.py fails the test that was running.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote, quote_plus

from mnemosyned.observe import logs
from mnemosyned.settings import FLAGS

CANARY: Final = "hunter2"
_FORMS: Final = {
    "a canary": re.compile(CANARY, re.IGNORECASE),
    "a generated token": re.compile(r"(?<![0-9a-f])[0-9a-f]{128}(?![0-9a-f])"),
    "an API key": re.compile(r"mnk_[\w-]{43}"),
    "an address with its password": re.compile(r"postgres(?:ql)?://[^\s:@/]*:[^\s@]+@"),
}
# `-help` tells the default, whose password is no secret.
_DEFAULT_ADDRESS: Final = FLAGS["postgres.address"].default
_leaks: list[str] = []


def search(text: str, where: str) -> None:
    """Remember what the text holds that it should not."""
    for what, form in _FORMS.items():
        for match in form.finditer(text.replace(_DEFAULT_ADDRESS, "")):
            around = match.string[max(0, match.start() - 200) : match.end() + 200]
            _leaks.append(f"{where} holds {what}: {around}")


def take_leaks() -> list[str]:
    """Return what has been found since the last time."""
    found, _leaks[:] = _leaks[:], []
    return found


@contextmanager
def searched_logs() -> Iterator[None]:
    """Search all that is logged in this process meanwhile, from debug on, in the form of production."""
    root, searcher = logging.getLogger(), _Searcher()
    before = {name: logging.getLogger(name).level for name in ("", *logs.LEAST_LEVEL_BY_LOGGER)}
    root.addHandler(searcher)
    logs.set_level("debug")
    yield
    root.removeHandler(searcher)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def encodings(secret: str) -> set[bytes]:
    """Return what a secret may look like in an output, in lower case."""
    raw = secret.encode()
    forms = {raw, raw.hex().encode(), repr(raw)[2:-1].encode(), json.dumps(secret)[1:-1].encode()}
    forms |= {quoted.encode() for quoted in (quote(secret), quote(secret, safe=""), quote_plus(secret))}
    for shift in range(3):
        # The digits of Base64 that are its own, wherever in the encoded text it begins.
        own = slice((shift * 8 + 5) // 6, (shift + len(raw)) * 8 // 6)
        text = bytes(shift) + raw
        forms |= {base64.b64encode(text)[own], base64.urlsafe_b64encode(text)[own]}
    return {form.lower() for form in forms}


def held(output: bytes, secrets: Iterable[str]) -> list[str]:
    """Return which of the secrets are in an output, in clear or encoded."""
    lower = output.lower()
    return [secret for secret in secrets if any(form in lower for form in encodings(secret))]


class _Searcher(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.formatter("production", io.StringIO()))

    def emit(self, record: logging.LogRecord) -> None:
        search(self.format(record), f"the log of {record.name}")
