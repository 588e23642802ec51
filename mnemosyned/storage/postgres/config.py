"""The settings of the PostgreSQL engine.

The address is a secret, since it holds a password: no error, log line or process title shows it. It may come
from a file (`-postgres.address.file`), which an orchestrator mounts. It may name files with secrets itself.

`-postgres.address=embedded:` is no address of a server, but asks for a private one (`private_server.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.config.flags import Section, setting
from mnemosyned.config.parsers import duration, integer, secret_file
from mnemosyned.storage.address_flags import AddressSection, is_private
from mnemosyned.storage.postgres.address import Address, AddressError, parse

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

# PostgreSQL cuts longer names off without an error, and two long names could then mean one table.
_MAX_IDENTIFIER_BYTES: Final = 63
# Parameters whose files hold a secret.
SECRET_FILES: Final = ("sslkey", "passfile")
_DEFAULT_ADDRESS: Final = "postgres://postgres:postgres@postgres/postgres?sslmode=disable"


def address(text: str) -> str:
    """Read a URL of PostgreSQL or of a private server; raises ValueError, whose text quotes no secret."""
    text = text.strip()
    if not is_private(text):
        # For its errors alone: what it leaves out may come from the environment, which `check` looks at.
        parse(text, {"HOME": os.environ.get("HOME", "")})
    return text


def shown(text: str) -> str:
    """Return what the log may show of an address: the hosts, the database and the user."""
    if is_private(text):
        return text
    try:
        return str(parse(text, os.environ))
    except AddressError:
        # Another engine is in use, and what the environment adds is wrong.
        return "[redacted]"


address.shown = shown  # type: ignore[attr-defined]  # read by `setting`


def identifier(text: str) -> str:
    """Read the name of a schema or table: any text of 1 to 63 bytes, as SQL quotes it. Raises ValueError."""
    if not text or "\0" in text or len(text.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"{text!r} is not a name of 1 to {_MAX_IDENTIFIER_BYTES} bytes")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig(AddressSection):
    """How PostgreSQL is reached. Durations are seconds; `pool.py` says which time-out fires first."""

    TITLE = "Storage: PostgreSQL (-storage=postgres)"
    EXAMPLE = "mnemosyned -postgres.address='postgres://user@host/database' -postgres.pool.size=32"

    address: str = setting(
        "postgres.address",
        _DEFAULT_ADDRESS,
        address,
        "postgres:// URL; embedded: for a private server, embedded:///dir with its data there",
        is_secret=True,
    )
    address_file: str = setting(
        "postgres.address.file",
        "",
        secret_file,
        "file with the URL instead, such as a mounted secret",
    )
    schema: str = setting("postgres.schema", "mnemosyne", identifier, "schema of the table")
    table: str = setting("postgres.table", "session", identifier, "table of the sessions")
    pool_size: int = setting("postgres.pool.size", "16", integer(2, 1000), "most connections")
    connect_timeout_s: float = setting(
        "postgres.connect.timeout", "2s", duration(0.001), "how long opening a connection may take"
    )
    statement_timeout_s: float = setting(
        "postgres.statement.timeout",
        "3s",
        duration(0.01),
        "how long a statement may take, and how long a call waits for a free connection",
    )
    binaries: str = setting(
        "postgres.bin",
        "",
        str,
        "directory with initdb and postgres for an embedded server; empty: searched in the usual places",
    )

    def check(self, config: Config) -> None:
        """See Section: also what the environment adds to the address, and the files that it names."""
        if self.is_chosen(config):
            self.warnings()

    def secret_files(self) -> dict[str, str]:
        """See Section."""
        found = self._parsed()
        named = {} if found is None else found.files()
        # Not `super()`: before Python 3.14 it means the class as it was before it got its slots.
        return Section.secret_files(self) | {
            f"postgres.address ({name})": path for name, path in named.items() if name in SECRET_FILES
        }

    def warnings(self) -> list[str]:
        """See Section: the parameters that are dropped, and a file that is not used. Raises ConfigError."""
        # It imports ssl, which a start without an error here needs later anyway.
        from mnemosyned.storage.postgres.address_files import AddressFiles  # noqa: PLC0415  # see above

        found = self._parsed()
        if found is None:
            return []
        try:
            unused = AddressFiles(found, os.environ).check()
        except AddressError as exc:
            raise self.refused(exc) from None
        ignored = [f"its parameter {name} is ignored: {word}" for name, word in found.dropped.items()]
        return [str(self.refused(text)) for text in (*ignored, *unused)]

    def _parsed(self) -> Address | None:
        """Return the address with what the environment adds; None: a private server. Raises ConfigError."""
        if is_private(self.address):
            return None
        try:
            return parse(self.address, os.environ)
        except AddressError as exc:
            raise self.refused(exc) from None
