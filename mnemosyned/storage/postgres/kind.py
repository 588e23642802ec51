"""Which kind of server speaks PostgreSQL's protocol, and so which statements it gets.

CockroachDB and YugabyteDB have PostgreSQL's protocol and SQL, and not its insides. What the statements use of
these has another form there (`is_plain`), with the same meaning:

    PostgreSQL                                        plain
    xmin, the version of a row                        the bag itself, or a digest of the row
    rename: three changes of a table in a statement   three statements in a transaction
    due_at, HOT, ctid, CREATE INDEX CONCURRENTLY      the form of a table before migration (`walks.py`)
    pg_control_system(), the start of the server      a random identity in a table beside the sessions'
    an advisory lock around set-up                    IF NOT EXISTS, run again after a collision
    textsend(), timestamptz_send(), for List         convert_to(), and the instant itself
    the catalog: checks of form, rights and changes   the trial alone (`trial.py`)
    settings of the planner, read again               time-outs alone

Everything here is PostgreSQL's own SQL too. So the tests run the plain statements on PostgreSQL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mnemosyned.storage.postgres.table_facts import AnyConnection


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of server."""

    name: str
    is_plain: bool  # it gets the statements that need nothing of PostgreSQL's insides


POSTGRESQL: Final = Kind("PostgreSQL", is_plain=False)


def kind_of(connection: AnyConnection) -> Kind:
    """Return what a server says of itself when a connection is opened; no question."""
    settings = connection.get_settings()
    if getattr(settings, "crdb_version", None):
        return Kind("CockroachDB", is_plain=True)
    # As in `15.2-YB-2025.1.0.0-b0`.
    if "-YB-" in getattr(settings, "server_version", ""):
        return Kind("YugabyteDB", is_plain=True)
    return POSTGRESQL
