"""The two flags of a server's address: the address itself, or a file that has it.

The address is a secret, since it may hold a password: no error, log line or process title shows it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from mnemosyned.config.flags import ConfigError, Section, flags_of
from mnemosyned.config.parsers import words_in
from mnemosyned.storage.addresses import AddressError

if TYPE_CHECKING:
    from mnemosyned.config.config import Config


def is_private(text: str) -> bool:
    """Tell whether an address asks for a private server."""
    return text.startswith("embedded:")


def address_parser(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Return how a flag takes an address.

    `parse` raises a ValueError whose text quotes no secret. The text of what it returns may be logged.
    """

    def address(text: str) -> str:
        text = text.strip()
        if not is_private(text):
            parse(text)
        return text

    def shown(text: str) -> str:
        return text if is_private(text) else str(parse(text))

    address.shown = shown  # type: ignore[attr-defined]  # read by `setting`
    return address


class AddressSection(Section):
    """The section of an engine whose server has an address."""

    __slots__ = ()

    # Each section declares them as settings of these names.
    address: str
    address_file: str

    def resolved(self, sources: Mapping[str, str]) -> Self:
        """See Section: read the address from its file, if one is named.

        Raises:
            ConfigError: both are given, or the file cannot be read or holds no address.
        """
        if not self.address_file:
            return self
        flags = flags_of(type(self))
        if flags["address"].name in sources:
            given = sources[flags["address_file"].name]
            raise ConfigError(f"{given}: -{flags['address'].name} is given as well")
        return cast("Self", replace(cast("Any", self), address=self.address_in_file()))

    def address_in_file(self) -> str:
        """Return the address that the file has now. Raises ConfigError."""
        flags = flags_of(type(self))
        # All words: a second line by mistake makes the address wrong instead of being ignored.
        words = words_in(flags["address_file"].name, self.address_file)
        try:
            return cast("str", flags["address"].parse(" ".join(words)))
        except ValueError as exc:
            raise self.refused(f"{self.address_file}: {exc}") from None

    def is_chosen(self, config: Config) -> bool:
        """Tell whether -storage names this engine."""
        # Not above: the registry imports the modules of the sections.
        from mnemosyned.storage.engines import StorageConfig  # noqa: PLC0415  # see above

        return config[StorageConfig].engine.section is type(self)

    def refused(self, reason: object) -> ConfigError:
        """Return what to raise for the flag that the address comes from."""
        flag = flags_of(type(self))["address_file" if self.address_file else "address"]
        return ConfigError(f"flag -{flag.name}: {reason}")


def check_authorities(name: str, path: str) -> None:
    """Read a file of authorities, which a parameter of an address names. Raises AddressError."""
    try:
        if path:
            _new_context().load_verify_locations(path)
    except (OSError, ValueError) as exc:
        raise AddressError(f"{name}: {path}: {_reason(exc, 'it holds no certificate')}") from None


def check_certificate(names: str, cert: str, key: str = "", *, password: str = "", otherwise: str) -> None:
    """Read the file of a certificate, and that of its key, if it is another one.

    Raises:
        AddressError: it names the files, and has the system's reason, or `otherwise`.
    """
    try:
        if cert:
            # Without a password, OpenSSL would ask for one at the terminal.
            _new_context().load_cert_chain(cert, key or None, password=password or "none")
    except (OSError, ValueError) as exc:
        paths = ", ".join(filter(None, (cert, key)))
        raise AddressError(f"{names}: {paths}: {_reason(exc, otherwise)}") from None


def _new_context() -> ssl.SSLContext:
    # `create_default_context` would read the authorities of the system.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _reason(exc: OSError | ValueError, otherwise: str) -> str:
    """Return what the system says; the texts of OpenSSL name no cause that helps."""
    if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError):
        return exc.strerror or otherwise
    return otherwise
