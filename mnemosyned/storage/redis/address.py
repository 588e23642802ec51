"""Addresses of Redis: what one says, and what is wrong in it. Pure.

    redis://user:password@host:6379/0                                 one server; rediss:// with TLS
    redis+sentinel://user:password@one:26379,two:26379/service?db=0   the primary that Sentinels name
    redis+cluster://user:password@one:6379,two:6379                   some nodes of a cluster
    unix:///run/redis/redis.sock?db=0                                 a socket of this machine

No error quotes a part that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote

from mnemosyned.storage.addresses import NO_LOGIN, AddressError, Login, host_and_port, joined, login

_PORTS: Final = {
    "redis": 6379,
    "rediss": 6379,
    "redis+sentinel": 26379,
    "rediss+sentinel": 26379,
    "redis+cluster": 6379,
    "rediss+cluster": 6379,
}
_SCHEMES: Final = (*_PORTS, "unix")
_PARAMETERS: Final = ("db", "cacert", "cert", "key", "sentinel_username", "sentinel_password")
_MAX_DATABASE: Final = 9999


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of TLS; empty: the authorities of this machine, and no certificate of ours."""

    cacert: str = ""
    cert: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the server is, and how it is entered."""

    hosts: tuple[tuple[str, int], ...]  # of the server, of the Sentinels, or of some nodes of a cluster
    path: str = ""  # of a socket; then there are no hosts
    service: str = ""  # the name that Sentinels know the primary by; empty: there are none
    database: int = 0
    login: Login = NO_LOGIN
    sentinel_login: Login = NO_LOGIN
    is_tls: bool = False
    is_cluster: bool = False
    files: Files = Files()

    @property
    def where(self) -> dict[str, str]:
        """What the log may show."""
        shown = {"server": ", ".join(joined(*host) for host in self.hosts) or self.path}
        if self.service:
            shown["service"] = self.service
        if not self.is_cluster:
            shown["database"] = str(self.database)
        return shown | {"user": self.login.user or "default"}

    def __str__(self) -> str:
        """Return it without any secret."""
        return ", ".join(f"{name} {value}" for name, value in self.where.items())


def parse(text: str) -> Address:
    """Read an address. Raises AddressError."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise AddressError("it is not a URL such as redis://host:6379/0")
    if scheme not in _SCHEMES:
        raise AddressError(f"its scheme is not one of {', '.join(_SCHEMES)}")
    before, _, query = rest.partition("?")
    parameters = _parameters(query)
    files = _files(scheme, parameters)
    if scheme == "unix":
        return _socket(before, parameters)
    authority, _, path = before.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    address = Address(
        hosts=tuple(host_and_port(part, _PORTS[scheme]) for part in hosts.split(",")),
        login=login(userinfo, scheme="redis", needs=("password",)),
        sentinel_login=Login(
            user=parameters.get("sentinel_username", ""), password=parameters.get("sentinel_password", "")
        ),
        is_tls=scheme.startswith("rediss"),
        files=files,
    )
    if scheme.endswith("+sentinel"):
        return _with_sentinels(address, path, parameters)
    if scheme.endswith("+cluster"):
        return _cluster(address, path, parameters)
    return _single(address, path, parameters)


def _with_sentinels(address: Address, path: str, parameters: Mapping[str, str]) -> Address:
    if not path:
        raise AddressError("it lacks the name of the service: redis+sentinel://host:26379/service")
    return replace(address, service=unquote(path), database=_database(parameters.get("db", "")))


def _cluster(address: Address, path: str, parameters: Mapping[str, str]) -> Address:
    _refuse_sentinel_login(address)
    if path.strip("0") or parameters.get("db", "").strip("0"):
        raise AddressError("it names a database: a Redis Cluster has none but 0")
    return replace(address, is_cluster=True)


def _single(address: Address, path: str, parameters: Mapping[str, str]) -> Address:
    if len(address.hosts) > 1:
        raise AddressError("it has several hosts: only redis+sentinel:// and redis+cluster:// take them")
    if path and "db" in parameters:
        raise AddressError("it names its database twice")
    _refuse_sentinel_login(address)
    return replace(address, database=_database(path or parameters.get("db", "")))


def _refuse_sentinel_login(address: Address) -> None:
    if address.sentinel_login != NO_LOGIN:
        raise AddressError("sentinel_username and sentinel_password need redis+sentinel://")


def _files(scheme: str, parameters: Mapping[str, str]) -> Files:
    files = Files(**{name: parameters.get(name, "") for name in ("cacert", "cert", "key")})
    if not (files.cacert + files.cert + files.key).isprintable():
        raise AddressError("cacert, cert or key is not printable")
    if bool(files.cert) != bool(files.key):
        raise AddressError("cert and key belong together")
    if files != Files() and not scheme.startswith("rediss"):
        raise AddressError("cacert, cert and key need rediss://, rediss+sentinel:// or rediss+cluster://")
    return files


def _socket(before: str, parameters: Mapping[str, str]) -> Address:
    userinfo, _, path = before.rpartition("@")
    if not path.startswith("/"):
        raise AddressError("it is not unix:// and an absolute path")
    return Address(
        hosts=(),
        path=unquote(path),
        database=_database(parameters.get("db", "")),
        login=login(userinfo, scheme="redis", needs=("password",)),
    )


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in _PARAMETERS:
            # The name of an unknown parameter may be part of a password with a ? in it.
            raise AddressError(f"it has a parameter that is not one of {', '.join(_PARAMETERS)}")
        if name in found:
            raise AddressError(f"it has the parameter {name} twice")
        found[name] = unquote(value)
    return found


def _database(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII):
        raise AddressError(f"its database is not a number from 0 to {_MAX_DATABASE}")
    return int(text)
