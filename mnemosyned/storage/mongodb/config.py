"""The settings of the MongoDB engine.

The address is a secret, since it may hold a password: no error, log line or process title shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import duration, integer, secret_file
from mnemosyned.storage.address_flags import (
    AddressSection,
    address_parser,
    check_authorities,
    check_certificate,
    is_private,
)
from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.mongodb.address import Address, parse

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

_MAX_COLLECTION_BYTES: Final = 100


address = address_parser(parse)


def collection(text: str) -> str:
    """Read the name of a collection, with which the names of the others begin."""
    if (
        not text
        or len(text.encode()) > _MAX_COLLECTION_BYTES
        or not text.isprintable()
        or set(text) & set("$ ")
        or text.startswith("system.")
        # The driver refuses these.
        or not all(text.split("."))
    ):
        raise ValueError(
            f"{text!r} is not a name of 1 to {_MAX_COLLECTION_BYTES} bytes without spaces and $, "
            "which does not begin with system. and has something on both sides of each dot"
        )
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class MongoConfig(AddressSection):
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

    def check(self, config: Config) -> None:
        """See Section: whether the client is installed, and the files that the address names."""
        if not self.is_chosen(config):
            return
        if find_spec("pymongo") is None:
            raise ConfigError(
                "flag -storage: mongodb needs the package pymongo: pip install 'mnemosyned[mongodb]'"
            )
        if is_private(self.address):
            raise self.refused(
                "a private MongoDB cannot be started: start a replica set yourself, and give its address, "
                "such as -mongodb.address=mongodb://127.0.0.1:27017/?replicaSet=rs0"
            )
        try:
            check_files(parse(self.address))
        except AddressError as exc:
            raise self.refused(exc) from None

    def secret_files(self) -> dict[str, str]:
        """See Section."""
        key = "" if is_private(self.address) else parse(self.address).files.cert_and_key
        # Not `super()`: before Python 3.14 it means the class as it was before it got its slots.
        return Section.secret_files(self) | ({"mongodb.address (key)": key} if key else {})


def check_files(found: Address) -> None:
    """Read the files of TLS that an address names. Raises AddressError."""
    files = found.files
    check_authorities("tlsCAFile", files.cacert)
    check_certificate(
        "tlsCertificateKeyFile",
        files.cert_and_key,
        password=files.key_password,
        otherwise="it holds no certificate with its key, or its password is another one",
    )
