"""What addresses of Redis and of MongoDB have in common: a login, and hosts with ports. Pure.

No error quotes a part that may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

_MAX_PORT: Final = 65535


class AddressError(ValueError):
    """An address cannot be used; the text is one line without any secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """A user and its password; both empty: none is sent."""

    user: str = ""
    password: str = field(default="", repr=False)


NO_LOGIN: Final = Login()


def login(userinfo: str, *, scheme: str, needs: Collection[str]) -> Login:
    """Read what stands before the @ of an address; it needs `user`, `password`, both or none.

    Raises:
        AddressError: a part that it needs is missing, or has a control character.
    """
    user, _, password = userinfo.partition(":")
    found = Login(user=unquote(user), password=unquote(password))
    if userinfo and not all(getattr(found, name) for name in needs):
        raise AddressError(f"it has a user without a password: write {scheme}://user:password@host")
    if "\0" in found.password or not found.user.isprintable():
        raise AddressError("its user or password has a control character")
    return found


def host_and_port(text: str, default_port: int) -> tuple[str, int]:
    """Read a host, an IPv6 address in brackets, and its port if it has one. Raises AddressError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+)(?::(\d{1,5}))?", text)
    if match is None or not 0 < int(match[2] or default_port) <= _MAX_PORT:
        raise wrong_host()
    return match[1].strip("[]"), int(match[2] or default_port)


def wrong_host() -> AddressError:
    """Return what to raise for a host that is none; it may be the end of a password."""
    return AddressError("a host is missing or wrong: in a password, write each of @ : / ? # % as %40 …")


def joined(host: str, port: int) -> str:
    """Return a host and its port as an address has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
