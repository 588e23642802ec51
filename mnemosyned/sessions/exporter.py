"""Writing all live sessions of a storage as lines of text (`export_file.py`).

A walk in the sequence of the stored keys, a page at a time:

    page of sessions ──> live and sound ──> a line each ──> write
           │                  ├── expired: counted
           │                  └── damaged: counted, and told with a fingerprint
           └── the key after the last one is where the next page begins

Daemons may run meanwhile. What is in the file is then not of one instant: a session that is started, changed
or ended behind the walk is in it as it was. A session that is renamed (`storage/hashed.py`) may be missed, or
be in it twice. A second export, when no daemon runs, has everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mnemosyned.sessions import damage
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.damage_log import shown
from mnemosyned.sessions.export_file import Header, Summary, Writer
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.store import FullStore

PAGE: Final = 1000


async def export_all(
    store: FullStore,
    header: Header,
    limits: BagLimits,
    *,
    write: Callable[[str], object],
    complain: Callable[[str], object],
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """Write the whole file; return what is in it.

    `complain` gets a line for each damaged session, and `progress` the number of sessions after each page.
    `limits` are those of stored bags.

    Raises:
        StorageUnavailable: no answer. What was written has no last line.
    """
    writer = Writer()
    expired = damaged = 0
    write(writer.header(header))
    least = ""
    while page := await store.stored_from(least, limit=PAGE):
        now_us = await store.now_us()
        for one in page:
            reason = damage.reason_against(one.found, limits)
            if reason is not None:
                damaged += 1
                complain(f"{shown(one.stored_key)}  {reason}")
                continue
            assert isinstance(one.found, Session)
            if one.found.expires_at_us <= now_us:
                expired += 1
                continue
            write(writer.session(one.found))
        progress(writer.sessions)
        # The least key that is greater.
        least = page[-1].stored_key + "\0"
    write(writer.end(expired=expired, damaged=damaged))
    return Summary(sessions=writer.sessions, expired=expired, damaged=damaged)
