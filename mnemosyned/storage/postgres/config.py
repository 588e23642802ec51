"""The settings of the PostgreSQL engine.

The address is a secret, since it holds a password: no error, log line or process title shows it. It may come
from a file (`-postgres.address.file`), which an orchestrator mounts. It may name files with secrets itself.

`-postgres.address=embedded:` is no address of a server, but asks for a private one (`private_server.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import parse_qs

from mnemosyned.config.files import FileRefused, read_bytes
from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import duration, integer, secret_file, words_in

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

# PostgreSQL cuts longer names off without an error, and two long names could then mean one table.
_MAX_IDENTIFIER_BYTES: Final = 63
# Parameters of the address, whose files the driver reads.
_FILES_IN_ADDRESS: Final = ("sslkey", "passfile")
_DEFAULT_ADDRESS: Final = "postgres://postgres:postgres@postgres/postgres?sslmode=disable"


def address(text: str) -> str:
    """Read the address of a PostgreSQL server. Raises ValueError, whose text does not show it."""
    if not text.startswith(("postgres://", "postgresql://", "embedded:")):
        raise ValueError("it does not start with postgres://, postgresql:// or embedded:")
    return text


def identifier(text: str) -> str:
    """Read the name of a schema or table: any text of 1 to 63 bytes, as SQL quotes it. Raises ValueError."""
    if not text or "\0" in text or len(text.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"{text!r} is not a name of 1 to {_MAX_IDENTIFIER_BYTES} bytes")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig(Section):
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

    def resolved(self, sources: Mapping[str, str]) -> Self:
        """See Section: read the address from its file, if one is named.

        Raises:
            ConfigError: both are given, or the file cannot be read or holds no address.
        """
        if not self.address_file:
            return self
        if "postgres.address" in sources:
            raise ConfigError(f"{sources['postgres.address.file']}: -postgres.address is given as well")
        # All words: a second line by mistake makes the address wrong instead of being ignored.
        words = words_in("postgres.address.file", self.address_file)
        try:
            return replace(self, address=address(" ".join(words)))
        except ValueError as exc:
            raise ConfigError(f"flag -postgres.address.file: {self.address_file}: {exc}") from None

    def check(self, _: Config) -> None:
        """See Section."""
        for parameter, path in self._named_in_address().items():
            try:
                read_bytes(path, holds_secret=True)
            except FileRefused as exc:
                raise ConfigError(f"flag -postgres.address: its {parameter}, {path}: {exc}") from None

    def secret_files(self) -> dict[str, str]:
        """See Section."""
        named = {f"postgres.address ({key})": path for key, path in self._named_in_address().items()}
        # Not `super()`: before Python 3.14 it means the class as it was before it got its slots.
        return Section.secret_files(self) | named

    def _named_in_address(self) -> dict[str, str]:
        """Return the files that the driver reads because the address names them, by parameter."""
        if self.address.startswith("embedded:"):
            return {}
        given = parse_qs(self.address.partition("?")[2])
        return {key: given[key][-1] for key in _FILES_IN_ADDRESS if key in given}
