"""Addresses of MongoDB: what one says, and what is wrong in it. Pure.

    mongodb://user:password@one:27017,two:27017/sessions?replicaSet=rs0    a replica set, or a mongos
    mongodb+srv://user:password@cluster.example.net/sessions               the same, by its record in the DNS

These are the connection strings of MongoDB. An option that would weaken the daemon's promises is refused, and
so is one that a flag of the daemon stands for. No error quotes a part that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from mnemosyned.storage.addresses import (
    NO_LOGIN,
    AddressError,
    Login,
    host_and_port,
    joined,
    login,
    wrong_host,
)

DEFAULT_DATABASE: Final = "mnemosyne"
_SCHEMES: Final = ("mongodb", "mongodb+srv")
_DEFAULT_PORT: Final = 27017
_MAX_DATABASE_BYTES: Final = 63
_MAX_APP_NAME_BYTES: Final = 128
_X509: Final = "MONGODB-X509"
_MECHANISMS: Final = ("SCRAM-SHA-256", "SCRAM-SHA-1", _X509, "PLAIN")

# What an option must be, if it is given at all.
_REQUIRED: Final = {
    "w": ("majority", "an acknowledged write must be on a majority of the servers"),
    "journal": ("true", "an acknowledged write must be in the journal"),
    "retrywrites": ("true", "a write is repeated if the primary changes"),
    "readpreference": ("primary", "a secondary may still have a session that was ended"),
}
# What another flag says.
_FLAGS: Final = {
    "maxpoolsize": "-mongodb.pool.size",
    "connecttimeoutms": "-mongodb.connect.timeout",
    "serverselectiontimeoutms": "-mongodb.timeout",
    "sockettimeoutms": "-mongodb.timeout",
    "timeoutms": "-mongodb.timeout",
    "wtimeoutms": "-mongodb.timeout",
    "waitqueuetimeoutms": "-mongodb.timeout",
}
_INSECURE: Final = ("tlsinsecure", "tlsallowinvalidcertificates", "tlsallowinvalidhostnames")


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of TLS; empty: the authorities of this machine, and no certificate of ours."""

    cacert: str = ""
    cert_and_key: str = ""
    key_password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the servers are, and how they are entered."""

    hosts: tuple[str, ...]  # with ports; the name in the DNS with mongodb+srv
    is_srv: bool = False
    database: str = DEFAULT_DATABASE
    is_database_given: bool = False  # then it is where the user is known, too
    login: Login = NO_LOGIN
    files: Files = Files()
    options: Mapping[str, str | bool | int] = field(default_factory=dict)  # as the client takes them

    @property
    def url(self) -> str:
        """What the client takes besides the login and the options."""
        scheme = "mongodb+srv" if self.is_srv else "mongodb"
        return f"{scheme}://{','.join(self.hosts)}/{self.database if self.is_database_given else ''}"

    @property
    def where(self) -> dict[str, str]:
        """What the log may show."""
        servers = ", ".join(map(unquote, self.hosts)) + (" (SRV)" if self.is_srv else "")
        return {"server": servers, "database": self.database, "user": self.login.user or "none"}

    def __str__(self) -> str:
        """Return it without any secret."""
        return ", ".join(f"{name} {value}" for name, value in self.where.items())


def parse(text: str) -> Address:
    """Read an address. Raises AddressError."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise AddressError("it is not a URL such as mongodb://host:27017/sessions")
    if scheme not in _SCHEMES:
        raise AddressError(f"its scheme is not one of {', '.join(_SCHEMES)}")
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    given = _given(query)
    is_srv = scheme == "mongodb+srv"
    options = _options(given, is_srv=is_srv)
    address = Address(
        hosts=_srv_host(hosts) if is_srv else tuple(_host(part) for part in hosts.split(",")),
        is_srv=is_srv,
        database=_database(path),
        is_database_given=bool(path),
        login=login(
            userinfo,
            scheme="mongodb",
            needs=() if options.get("authMechanism") == _X509 else ("user", "password"),
        ),
        files=_files(given, is_tls=bool(options.get("tls", is_srv))),
        options=options,
    )
    _check_together(address)
    return address


def _check_together(address: Address) -> None:
    """Refuse options that the client would not take with one another."""
    options, mechanism = address.options, address.options.get("authMechanism")
    if options.get("directConnection") and (address.is_srv or len(address.hosts) > 1):
        raise AddressError("directConnection needs mongodb:// and one host")
    if "replicaSet" in options and options.get("srvMaxHosts"):
        raise AddressError("it has srvMaxHosts, which is for a mongos, and replicaSet")
    if mechanism == _X509:
        if not address.files.cert_and_key:
            raise AddressError(f"{_X509} needs tlsCertificateKeyFile")
        if address.login.password:
            raise AddressError(f"{_X509} takes no password")
        if options.get("authSource", "$external") != "$external":
            raise AddressError(f"{_X509} takes no authSource but $external")
    elif mechanism and not address.login.user:
        raise AddressError("its authMechanism needs a user and a password")


def _given(query: str) -> dict[str, str]:
    """Return the options by their names in small letters, of which each has one meaning."""
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        name = {"ssl": "tls", "j": "journal"}.get(name.lower(), name.lower())
        if name in found:
            raise AddressError(f"it has the option {name} twice" if name in _KNOWN else _unknown())
        found[name] = unquote(value)
    return found


def _options(given: Mapping[str, str], *, is_srv: bool) -> dict[str, str | bool | int]:
    options: dict[str, str | bool | int] = {}
    for name, value in given.items():
        if name in _TAKEN:
            known, parser = _TAKEN[name]
            if known.startswith("srv") and not is_srv:
                raise AddressError(f"its option {known} needs mongodb+srv://")
            options[known] = parser(known, value)
        elif name not in _FILES:
            _check_other(name, value)
    return options


def _check_other(name: str, value: str) -> None:
    """Check an option that the client does not get."""
    if name in _FLAGS:
        raise AddressError(f"it has the option {name}: use the flag {_FLAGS[name]} instead")
    if name in _INSECURE:
        raise AddressError(f"it has the option {name}: name the authority of the servers in tlsCAFile")
    if name not in _REQUIRED:
        raise AddressError(_unknown())
    wanted, why = _REQUIRED[name]
    if value.lower() != wanted:
        raise AddressError(f"its option {name} is not {wanted}: {why}")


def _unknown() -> str:
    # The name of an unknown option may be part of a password with a ? in it.
    return f"it has an option that is not one of {', '.join(_shown_options())}"


def _bool(name: str, value: str) -> bool:
    if value.lower() not in {"true", "false"}:
        raise AddressError(f"its option {name} is neither true nor false")
    return value.lower() == "true"


def _text(name: str, value: str) -> str:
    if not value or not value.isprintable():
        raise AddressError(f"its option {name} is empty or not printable")
    return value


def _app_name(name: str, value: str) -> str:
    if len(value.encode()) > _MAX_APP_NAME_BYTES:
        raise AddressError(f"its option {name} is longer than {_MAX_APP_NAME_BYTES} bytes")
    return _text(name, value)


def _mechanism(name: str, value: str) -> str:
    if value.upper() not in _MECHANISMS:
        raise AddressError(f"its option {name} is not one of {', '.join(_MECHANISMS)}")
    return value.upper()


def _number(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,4}", value, re.ASCII):
        raise AddressError(f"its option {name} is not a number")
    return int(value)


# Options that the client gets, by their names in small letters.
_TAKEN: Final[dict[str, tuple[str, Callable[[str, str], str | bool | int]]]] = {
    name.lower(): (name, parser)
    for name, parser in (
        ("tls", _bool),
        ("authSource", _text),
        ("authMechanism", _mechanism),
        ("replicaSet", _text),
        ("directConnection", _bool),
        ("retryReads", _bool),
        ("appName", _app_name),
        ("srvServiceName", _text),
        ("srvMaxHosts", _number),
    )
}
_FILES: Final = {
    "tlscafile": "tlsCAFile",
    "tlscertificatekeyfile": "tlsCertificateKeyFile",
    "tlscertificatekeyfilepassword": "tlsCertificateKeyFilePassword",
}
_KNOWN: Final = {*_TAKEN, *_FILES, *_REQUIRED}


def _shown_options() -> list[str]:
    return [*(name for name, _ in _TAKEN.values()), *_FILES.values()]


def _files(given: Mapping[str, str], *, is_tls: bool) -> Files:
    cacert, cert, password = (
        _text(shown, given[name]) if name in given else "" for name, shown in _FILES.items()
    )
    if (cacert or cert) and not is_tls:
        raise AddressError("tlsCAFile and tlsCertificateKeyFile need tls=true")
    if password and not cert:
        raise AddressError("tlsCertificateKeyFilePassword needs tlsCertificateKeyFile")
    return Files(cacert=cacert, cert_and_key=cert, key_password=password)


def _srv_host(text: str) -> tuple[str, ...]:
    if "," in text or ":" in text:
        raise AddressError("with mongodb+srv:// it must have one host, and no port")
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+\.?", text):
        raise wrong_host()
    return (text,)


def _host(text: str) -> str:
    if re.fullmatch(r"%2f[A-Za-z0-9%_.~-]+\.sock", text, re.IGNORECASE):
        return text  # a socket of this machine
    return joined(*host_and_port(text, _DEFAULT_PORT))


def _database(path: str) -> str:
    database = unquote(path)
    if not path:
        return DEFAULT_DATABASE
    if (
        len(database.encode()) > _MAX_DATABASE_BYTES
        or not database.isprintable()
        or set(database) & set('/\\. "$*<>:|?')
    ):
        raise AddressError(
            f"its database is not a name of 1 to {_MAX_DATABASE_BYTES} bytes without spaces and "
            'any of /\\."$*<>:|?'
        )
    return database
