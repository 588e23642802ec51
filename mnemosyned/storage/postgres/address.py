"""The address of a PostgreSQL server: a URL as libpq reads it, and every mistake in it as one line.

    postgres://user:password@host:port,host:port/database?parameter=value&…
               └─ percent-encoded ─┘ └─ [::1]:5432, %2Frun%2Fpostgresql ─┘

    PG* variables ──┐
    service file  ──┼──> values by name, the later wins ──> checked ──> Address
    the URL       ──┘

- Each parameter is used, set on the connections, dropped with a word, or refused: `parameters.py` has the
  table. An unknown one is refused.
- What the URL leaves out comes from the service that it names, then from the variables that libpq reads, then
  from libpq's defaults: the user of the process, a database of the user's name, port 5432, sslmode prefer.
- In a URL, `@ : / ? # %` and spaces of a user or password are percent-encoded. An `@` or `:` in the password
  is read all the same, since no host has one. The others change where the password ends, and are refused.
- A parameter wins over the same value before the `?`, as in libpq: `?host=/run/postgresql`.
- A host that begins with `/` is a directory with the server's socket.

The texts of errors name parameters, never values that may be secret. A URL with a mistake is taken apart in
the wrong places, so a text quotes nothing of one in which a password may continue.

No file but the service file is read here; `files.py` reads the others.
"""

from __future__ import annotations

import configparser
import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn
from urllib.parse import parse_qsl, unquote

from mnemosyned.config.files import FileRefused, read_bytes, text_of
from mnemosyned.storage.postgres.parameters import (
    USED,
    VARIABLES,
    complaint_about,
    is_setting,
    word_about,
)

_DEFAULT_PORT: Final = "5432"
_SOCKET_DIRECTORIES: Final = ("/run/postgresql", "/var/run/postgresql")
_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TLS_VERSIONS: Final = ("TLSv1.2", "TLSv1.3")
_ENCODE: Final = (
    "a user, password or database with one of @ : / ? # % or a space must have it percent-encoded"
)
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,62}")
# The session store must write.
# Unless the address says otherwise: if no server can be written to, one to read from.
PREFER_WRITABLE: Final = ""
_TARGETS: Final = ("any", "read-write", "primary")


class AddressError(ValueError):
    """The address cannot be used; the text is one line without a secret, to follow the name of its flag."""


class _ParameterError(Exception):
    """A parameter cannot be used; the arguments are its name and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One server: a name, an IP address or a directory; `hostaddr` saves the look-up of the name."""

    name: str
    port: int
    hostaddr: str = ""

    @property
    def is_socket(self) -> bool:
        """Whether it is a Unix socket."""
        return self.name.startswith("/")

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{name}/.s.PGSQL.{self.port}" if self.is_socket else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How connections are encrypted; empty names of files: none."""

    mode: str
    root: str = ""  # or "system"
    certificate: str = ""
    key: str = ""
    key_password: str = field(default="", repr=False)
    revoked: str = ""
    is_direct: bool = False  # without PostgreSQL's own question before the handshake
    names_host: bool = True  # SNI
    oldest: str = "TLSv1.2"
    newest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Everything that an address says."""

    hosts: tuple[Host, ...]
    user: str
    password: str = field(repr=False)
    database: str
    passfile: str  # where to find the password otherwise; "": libpq's default
    tls: Tls
    options: str
    settings: Mapping[str, str]  # of PostgreSQL, for each connection
    keepalives: Mapping[str, int]  # by libpq's names
    target: str
    is_balanced: bool  # hosts in random sequence
    kerberos: Mapping[str, str]
    dropped: Mapping[str, str]  # parameters, and why

    def __str__(self) -> str:
        hosts = ", ".join(map(str, self.hosts))
        return f"{hosts}, database {self.database}, user {self.user}"

    @property
    def grant(self) -> str:
        """The SQL by which the user may connect."""
        database, user = ('"' + name.replace('"', '""') + '"' for name in (self.database, self.user))
        return f"GRANT CONNECT ON DATABASE {database} TO {user}"

    def files(self) -> dict[str, str]:
        """Return the files that the address names, by parameter."""
        named = {
            "sslrootcert": "" if self.tls.root == "system" else self.tls.root,
            "sslcert": self.tls.certificate,
            "sslkey": self.tls.key,
            "sslcrl": self.tls.revoked,
            "passfile": self.passfile,
        }
        return {name: path for name, path in named.items() if path}


def parse(text: str, environ: Mapping[str, str]) -> Address:
    """Return what an address says.

    Raises:
        AddressError: it is no URL, or a value or parameter cannot be used.
    """
    given = _given(text.strip())
    variables = {name: variable for variable, name in VARIABLES.items() if environ.get(variable)}
    values = {name: environ[variable] for name, variable in variables.items()}
    service = given.get("service") or values.get("service", "")
    if service:
        path = given.get("servicefile") or values.get("servicefile") or _at_home(environ, ".pg_service.conf")
        given = _service(service, path) | given
    values |= given
    try:
        for name, value in values.items():
            if complaint := complaint_about(name, value):
                _refuse(name, complaint)
        return _address(values, environ)
    except _ParameterError as exc:
        name, complaint = exc.args
        is_variable = name in variables and name not in given
        what = f"variable {variables[name]}" if is_variable else f"its parameter {name}"
        raise AddressError(f"{what} {complaint}") from None


def _given(url: str) -> dict[str, str]:
    """Return the values in a URL by the names of parameters, not yet checked."""
    scheme, _, rest = url.partition("://")
    if scheme not in {"postgres", "postgresql"}:
        if re.match(r"\s*\w+\s*=", url):
            raise AddressError("it is a list of keywords; write it as postgres://user:password@host/database")
        raise AddressError("it does not start with postgres:// or postgresql://" if url else "it is empty")
    if any(char.isspace() or not char.isprintable() for char in rest):
        raise AddressError("it has a space or a line break; write a space as %20")
    if re.search(r"%(?![0-9A-Fa-f]{2})", rest):
        raise AddressError("it has a % that begins no percent-encoded character; write a % as %25")
    if "#" in rest:
        raise AddressError(f"it has a #; {_ENCODE}")
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    if "@" in path:
        raise AddressError(f"it has an @ after the first /; {_ENCODE}")
    parameters = _parameters(query) if query else {}
    if "@" in query and "@" not in authority and any(complaint_about(*one) for one in parameters.items()):
        # The names may be parts of a password.
        raise AddressError(f"it has an @ after the first ?; {_ENCODE}")
    return {**_authority(authority), **_database(path), **parameters}


def _authority(text: str) -> dict[str, str]:
    # The last @: no host has one.
    credentials, _, hosts = text.rpartition("@")
    user, colon, password = credentials.partition(":")
    found = {"user": unquote(user), "password": unquote(password) if colon else ""}
    names, ports = [], []
    for one in hosts.split(",") if hosts else []:
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:]*)(?::([^:]*))?", one)
        if match is None:
            raise AddressError(
                f"its host and port cannot be read: an IPv6 address is written as [::1]:5432; {_ENCODE}"
            )
        names.append(unquote(match[1].strip("[]")))
        ports.append(match[2] or "")
    if any(port and not _is_port(port) for port in ports):
        raise AddressError(f"its port is not a number from 1 to 65535; {_ENCODE}")
    if names:
        found["host"] = ",".join(names)
    if any(ports):
        found["port"] = ",".join(port or _DEFAULT_PORT for port in ports)
    return {name: value for name, value in found.items() if value}


def _database(path: str) -> dict[str, str]:
    if "/" in path:
        raise AddressError(f"its database has a /; {_ENCODE}")
    return {"dbname": unquote(path)} if path else {}


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in query.split("&"):
        if one and "=" not in one:
            known = f"its parameter {one}" if one in USED else "a parameter after the ?"
            raise AddressError(f"{known} has no value; {_ENCODE}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise AddressError("a parameter after the ? is no UTF-8") from None
    for name, value in pairs:
        if not _NAME.fullmatch(name):
            raise AddressError(f"the name of a parameter after the ? cannot be read; {_ENCODE}")
        if found.setdefault(name, value) != value:
            raise AddressError(f"its parameter {name} is given twice")
    if "database" in found:
        found.setdefault("dbname", found.pop("database"))
    return found


def _service(name: str, path: str) -> dict[str, str]:
    sections = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    # As they are: names of parameters have upper and lower case.
    sections.optionxform = str  # type: ignore[assignment,method-assign]  # documented use
    try:
        sections.read_string(text_of(read_bytes(path, holds_secret=True)))
    except FileRefused as exc:
        raise AddressError(f"its service {name}, in {path}: {exc}") from None
    except configparser.Error:
        raise AddressError(f"its service {name}, in {path}: the file cannot be read as sections") from None
    if not sections.has_section(name):
        raise AddressError(f"its service {name} is not in {path}")
    found = dict(sections.items(name))
    if "database" in found:
        found.setdefault("dbname", found.pop("database"))
    return found


def _address(values: Mapping[str, str], environ: Mapping[str, str]) -> Address:
    user = values.get("user") or _user_of_the_process()
    settings = {name: value for name, value in values.items() if is_setting(name)}
    settings["application_name"] = (
        values.get("application_name") or values.get("fallback_application_name") or "mnemosyned"
    )
    return Address(
        hosts=_hosts(values),
        user=user,
        password=values.get("password", ""),
        database=values.get("dbname") or user,
        passfile=values.get("passfile", ""),
        tls=_tls(values, environ),
        options=values.get("options", ""),
        settings=settings,
        keepalives=_keepalives(values),
        target=_one_of(values, "target_session_attrs", _TARGETS, "any")
        if values.get("target_session_attrs")
        else PREFER_WRITABLE,
        is_balanced=_one_of(values, "load_balance_hosts", ("disable", "random"), "disable") == "random",
        kerberos={name: values[name] for name in ("krbsrvname", "gsslib") if values.get(name)},
        dropped={name: word for name in values if (word := word_about(name))},
    )


def _hosts(values: Mapping[str, str]) -> tuple[Host, ...]:
    addresses = values["hostaddr"].split(",") if values.get("hostaddr") else []
    names = values["host"].split(",") if values.get("host") else list(addresses)
    if not names:
        sockets = [one for one in _SOCKET_DIRECTORIES if os.path.isdir(one)]  # noqa: PTH112  # see `_if_there`
        names = [*dict.fromkeys(sockets[:1]), "localhost"]
    ports = values.get("port", "").split(",")
    for one in ports:
        if one and not _is_port(one):
            _refuse("port", "is not a number from 1 to 65535")
    if len(ports) not in {1, len(names)}:
        raise AddressError(f"it has {len(ports)} ports for {len(names)} hosts")
    if addresses and len(addresses) != len(names):
        raise AddressError(f"it has {len(addresses)} addresses in hostaddr for {len(names)} hosts")
    if not all(re.fullmatch(r"/.*|[\w.:%-]+", one) for one in names):
        raise AddressError("one of its hosts is not a name, an address or a directory")
    return tuple(
        Host(
            name=name,
            port=int(ports[at if len(ports) > 1 else 0] or _DEFAULT_PORT),
            hostaddr=addresses[at] if addresses else "",
        )
        for at, name in enumerate(names)
    )


def _tls(values: Mapping[str, str], environ: Mapping[str, str]) -> Tls:
    root = values.get("sslrootcert") or _if_there(environ, "root.crt")
    mode = _mode(values, "verify-full" if root == "system" else "prefer")
    if root == "system" and mode != "verify-full":
        _refuse("sslmode", f"cannot be {mode} with sslrootcert=system, since any authority could sign")
    if mode.startswith("verify") and not root:
        _refuse(
            "sslmode", f"is {mode}, which needs sslrootcert=FILE, or sslrootcert=system for this machine's"
        )
    # As libpq does it, also where it falls back to a connection without TLS.
    is_verified = mode != "disable" and bool(root)
    if values.get("sslcrl") and (not is_verified or mode in {"allow", "prefer"}):
        _refuse("sslcrl", "needs sslmode=verify-full and sslrootcert: no certificate is verified otherwise")
    is_direct = _one_of(values, "sslnegotiation", ("postgres", "direct"), "postgres") == "direct"
    if is_direct and mode in {"disable", "allow", "prefer"}:
        _refuse("sslnegotiation", "needs sslmode=require, verify-ca or verify-full")
    certificate, key = _certificate(values, environ)
    return Tls(
        mode=mode,
        root=root if is_verified else "",
        certificate=certificate,
        key=key,
        key_password=values.get("sslpassword", ""),
        revoked=values.get("sslcrl") or (_if_there(environ, "root.crl") if is_verified else ""),
        is_direct=is_direct,
        names_host=_one_of(values, "sslsni", ("0", "1"), "1") == "1",
        oldest=_one_of(values, "ssl_min_protocol_version", _TLS_VERSIONS, "TLSv1.2"),
        newest=_one_of(values, "ssl_max_protocol_version", ("", *_TLS_VERSIONS), ""),
    )


def _certificate(values: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the files of the client's certificate and of its key; both empty: it shows none."""
    use = _one_of(values, "sslcertmode", ("allow", "disable"), "allow")
    certificate = values.get("sslcert") or _if_there(environ, "postgresql.crt")
    key = values.get("sslkey") or _if_there(environ, "postgresql.key")
    if use == "disable" or not (certificate or key):
        return "", ""
    if not certificate:
        _refuse("sslkey", "needs sslcert, the certificate of the key")
    # Both may be in one file.
    return certificate, key or certificate


def _mode(values: Mapping[str, str], default: str) -> str:
    if values.get("ssl"):
        # libpq reads it so, for addresses of JDBC.
        if values["ssl"] != "true":
            _refuse("ssl", "is known with the value true only; use sslmode")
        default = "require"
    if values.get("requiressl") == "1":
        default = "require"
    return _one_of(values, "sslmode", _MODES, default)


def _keepalives(values: Mapping[str, str]) -> dict[str, int]:
    names = ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
    found = {}
    for name in names:
        if values.get(name):
            if not re.fullmatch(r"\d{1,9}", values[name]):
                _refuse(name, "is not a whole number")
            found[name] = int(values[name])
    return found


def _one_of(values: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = values.get(name) or default
    if value not in choices:
        if name == "target_session_attrs" and value in {"standby", "read-only", "prefer-standby"}:
            _refuse(name, f"cannot be {value}: sessions are written; use primary or read-write")
        _refuse(name, f"is not one of {', '.join(one for one in choices if one)}")
    return value


def _user_of_the_process() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise AddressError("it names no user, and this process's user has no name") from None


def _is_port(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,5}", text)) and 1 <= int(text) <= 65535  # noqa: PLR2004  # 16 bits


def _at_home(environ: Mapping[str, str], name: str) -> str:
    return f"{environ['HOME']}/{name}" if environ.get("HOME") else name


def _if_there(environ: Mapping[str, str], name: str) -> str:
    """Return one of libpq's default files if it exists."""
    path = _at_home(environ, f".postgresql/{name}")
    # Not `Path.exists`, which raises for a home that this user may not look into, as after `su`.
    return path if environ.get("HOME") and os.path.exists(path) else ""  # noqa: PTH110


def _refuse(name: str, complaint: str) -> NoReturn:
    raise _ParameterError(name, complaint)
