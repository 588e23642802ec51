"""The settings of the Redis engine.

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
from mnemosyned.storage.redis.address import Address, parse

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

_MAX_PREFIX_BYTES: Final = 100
_MAX_REPLICAS: Final = 100


address = address_parser(parse)


def prefix(text: str) -> str:
    """Read what the names of all keys begin with."""
    if (
        not text
        or len(text.encode()) > _MAX_PREFIX_BYTES
        or not text.isprintable()
        or set(text) & set("{}*?[]\\ ")
    ):
        raise ValueError(
            f"{text!r} is not a text of 1 to {_MAX_PREFIX_BYTES} bytes without spaces and any of {{}}*?[]\\"
        )
    return text


def replicas(text: str) -> int | None:
    """Read a number of replicas, or `auto`: None."""
    if text == "auto":
        return None
    try:
        return integer(0, _MAX_REPLICAS)(text)
    except ValueError as exc:
        raise ValueError(f"{exc}, nor auto") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig(AddressSection):
    """How Redis is reached, and what an acknowledged write means. Durations are seconds."""

    TITLE = "Storage: Redis (-storage=redis)"
    EXAMPLE = "mnemosyned -storage=redis -redis.address='redis+sentinel://one,two,three/sessions'"

    address: str = setting(
        "redis.address",
        "redis://127.0.0.1:6379/0",
        address,
        "redis://, redis+sentinel:// or redis+cluster:// URL, rediss… with TLS, or unix://; "
        "embedded: for a private server",
        is_secret=True,
    )
    address_file: str = setting(
        "redis.address.file", "", secret_file, "file with the URL instead, such as a mounted secret"
    )
    prefix: str = setting("redis.prefix", "mnemosyne:", prefix, "what the names of all keys begin with")
    pool_size: int = setting("redis.pool.size", "8", integer(2, 1000), "most connections")
    connect_timeout_s: float = setting(
        "redis.connect.timeout", "2s", duration(0.001), "how long opening a connection may take"
    )
    timeout_s: float = setting(
        "redis.timeout",
        "3s",
        duration(0.01),
        "how long an answer may take, and the wait for a connection",
    )
    wait: int | None = setting(
        "redis.wait",
        "auto",
        replicas,
        "replicas that have a write before it is acknowledged; auto: 1 with Sentinels or a cluster, else 0",
    )
    buckets: int = setting(
        "redis.cluster.buckets",
        "128",
        integer(1, 16384),
        "parts of a cluster that can be on different primaries; the first start decides it",
    )

    def check(self, config: Config) -> None:
        """See Section: whether the client is installed, and the files that the address names."""
        if not self.is_chosen(config):
            return
        if find_spec("redis") is None or find_spec("hiredis") is None:
            raise ConfigError(
                "flag -storage: redis needs the packages redis and hiredis: pip install 'mnemosyned[redis]'"
            )
        if is_private(self.address):
            return
        try:
            check_files(parse(self.address))
        except AddressError as exc:
            raise self.refused(exc) from None

    def secret_files(self) -> dict[str, str]:
        """See Section."""
        key = "" if is_private(self.address) else parse(self.address).files.key
        # Not `super()`: before Python 3.14 it means the class as it was before it got its slots.
        return Section.secret_files(self) | ({"redis.address (key)": key} if key else {})


def check_files(found: Address) -> None:
    """Read the files of TLS that an address names. Raises AddressError."""
    files = found.files
    check_authorities("cacert", files.cacert)
    check_certificate(
        "cert, key", files.cert, files.key, otherwise="they do not fit, or the key has a password"
    )
