"""The settings of the MongoDB engine.

The address is a secret, since it may hold a password: no error, log line or process title shows it.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Self

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import duration, integer, secret_file, words_in
from mnemosyned.storage.mongodb.address import Address, AddressError, parse

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

_MAX_COLLECTION_BYTES: Final = 100


def address(text: str) -> str:
    """Read a connection string of MongoDB; raises ValueError, whose text quotes no secret."""
    text = text.strip()
    if not is_private(text):
        parse(text)
    return text


def shown(text: str) -> str:
    """Return what the log may show of an address."""
    return text if is_private(text) else str(parse(text))


address.shown = shown  # type: ignore[attr-defined]  # read by `setting`


def is_private(text: str) -> bool:
    """Tell whether an address asks for a private server, as `make run` does; there is none."""
    return text.startswith("embedded:")


def collection(text: str) -> str:
    """Read the name of a collection, with which the names of the others begin."""
    if (
        not text
        or len(text.encode()) > _MAX_COLLECTION_BYTES
        or not text.isprintable()
        or set(text) & set("$ ")
        or text.startswith("system.")
    ):
        raise ValueError(
            f"{text!r} is not a name of 1 to {_MAX_COLLECTION_BYTES} bytes without spaces and $, "
            "which does not begin with system."
        )
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class MongoConfig(Section):
    """How MongoDB is reached. Durations are seconds."""

    TITLE = "Storage: MongoDB (-storage=mongodb)"
    EXAMPLE = "mnemosyned -storage=mongodb -mongodb.address='mongodb://one,two,three/?replicaSet=rs0'"

    address: str = setting(
        "mongodb.address",
        "mongodb://127.0.0.1:27017/mnemosyne",
        address,
        "mongodb:// or mongodb+srv:// connection string",
        is_secret=True,
    )
    address_file: str = setting(
        "mongodb.address.file",
        "",
        secret_file,
        "file with the connection string instead, such as a mounted secret",
    )
    collection: str = setting(
        "mongodb.collection",
        "session",
        collection,
        "collection of the sessions; the names of others begin with it",
    )
    pool_size: int = setting(
        "mongodb.pool.size", "16", integer(2, 1000), "most connections for calls, to each server"
    )
    connect_timeout_s: float = setting(
        "mongodb.connect.timeout", "2s", duration(0.001), "how long opening a connection may take"
    )
    timeout_s: float = setting(
        "mongodb.timeout",
        "3s",
        duration(0.01),
        "how long a command may take, with the wait for a primary; and the wait for a connection",
    )

    def resolved(self, sources: Mapping[str, str]) -> Self:
        """See Section: read the address from its file, if one is named. Raises ConfigError."""
        if not self.address_file:
            return self
        if "mongodb.address" in sources:
            raise ConfigError(f"{sources['mongodb.address.file']}: -mongodb.address is given as well")
        return replace(self, address=self.address_in_file())

    def address_in_file(self) -> str:
        """Return the address that the file has now. Raises ConfigError."""
        words = words_in("mongodb.address.file", self.address_file)
        try:
            return address(" ".join(words))
        except ValueError as exc:
            raise ConfigError(f"flag -mongodb.address.file: {self.address_file}: {exc}") from None

    def check(self, config: Config) -> None:
        """See Section: whether the client is installed, and the files that the address names."""
        # Not above: the registry imports this module.
        from mnemosyned.storage.engines import StorageConfig  # noqa: PLC0415  # see above

        if config[StorageConfig].engine.section is not MongoConfig:
            return
        if find_spec("pymongo") is None:
            raise ConfigError(
                "flag -storage: mongodb needs the package pymongo: pip install 'mnemosyned[mongodb]'"
            )
        if is_private(self.address):
            raise ConfigError(
                f"flag -{self._flag}: a private MongoDB cannot be started: start a replica set yourself, and "
                "give its address, such as -mongodb.address=mongodb://127.0.0.1:27017/?replicaSet=rs0"
            )
        try:
            check_files(parse(self.address))
        except AddressError as exc:
            raise ConfigError(f"flag -{self._flag}: {exc}") from None

    def secret_files(self) -> dict[str, str]:
        """See Section."""
        key = "" if is_private(self.address) else parse(self.address).files.cert_and_key
        # Not `super()`: before Python 3.14 it means the class as it was before it got its slots.
        return Section.secret_files(self) | ({"mongodb.address (key)": key} if key else {})

    @property
    def _flag(self) -> str:
        return "mongodb.address.file" if self.address_file else "mongodb.address"


def check_files(found: Address) -> None:
    """Read the files of TLS that an address names. Raises AddressError."""
    files, context = found.files, ssl.create_default_context()
    try:
        if files.cacert:
            context.load_verify_locations(files.cacert)
    except (OSError, ssl.SSLError) as exc:
        reason = exc.strerror or "it holds no certificate"
        raise AddressError(f"tlsCAFile: {files.cacert}: {reason}") from None
    try:
        if files.cert_and_key:
            # Without a password, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(files.cert_and_key, password=files.key_password or "none")
    except (OSError, ssl.SSLError) as exc:
        reason = exc.strerror or "it holds no certificate with its key, or its password is another one"
        raise AddressError(f"tlsCertificateKeyFile: {files.cert_and_key}: {reason}") from None
