"""What the files that an address names hold: the context of TLS, and the password.

    sslrootcert, sslcrl, sslcert, sslkey ──> one context for each host
    passfile, or ~/.pgpass               ──> the password of a host

They are read for each new connection, if their stamps have changed. A file that is replaced by an unusable
one costs the change, not the connection: the last valid content stays, and the log says so once. At the start
and for `-check-config` an unusable file is an error that names the parameter and the file.

Contexts are made here and not by asyncpg, for three reasons: a connection goes to one IP address of a host,
and its certificate must still be the host's (`_HostContext`); sslrootcert=system; errors that name a file.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Mapping
from typing import Any, Final

from mnemosyned.config.files import FileRefused, read_bytes, text_of
from mnemosyned.security.file_reloader import stamp_of
from mnemosyned.storage.postgres.address import Address, AddressError, Host

log = logging.getLogger(__name__)

_SECRET_FILES: Final = ("sslkey", "passfile")
_TLS_PARAMETERS: Final = ("sslrootcert", "sslcrl", "sslcert", "sslkey")
_MARKS: Final = {
    "sslrootcert": (b"-----BEGIN CERTIFICATE-----", b"-----BEGIN TRUSTED CERTIFICATE-----"),
    "sslcert": (b"-----BEGIN CERTIFICATE-----",),
    "sslkey": (b"PRIVATE KEY-----",),
    "sslcrl": (b"-----BEGIN X509 CRL-----",),
}
_PGPASS_FIELDS: Final = 5
_NO_PEM: Final = "it is no PEM file"


class _HostContext(ssl.SSLContext):
    """Names the host to the server, and compares the certificate with it, whatever IP address was dialed."""

    host: str | None = None

    # As asyncio and uvloop call it.
    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *_: Any, **__: Any) -> ssl.SSLObject:  # noqa: ANN401
        return super().wrap_bio(incoming, outgoing, server_side=False, server_hostname=self.host)


class AddressFiles:
    """The files of one address, as of the last time that they were valid."""

    def __init__(self, address: Address, environ: Mapping[str, str]) -> None:
        self._address = address
        self._passfile = address.passfile
        self._is_default = False
        home = environ.get("HOME")
        # Not pathlib's, which raises if the home cannot be searched.
        if not self._passfile and home and not address.password and os.path.exists(f"{home}/.pgpass"):  # noqa: PTH110
            self._passfile, self._is_default = f"{home}/.pgpass", True
        self._contexts: dict[Host, _HostContext] = {}
        self._seen: list[tuple[int, ...] | None] | None = None
        self._passwords: list[list[str]] = []
        self._complaint = ""
        self._unused = ""

    def check(self) -> list[str]:
        """Read all files; return which of libpq's default files is not used, and why.

        Raises:
            AddressError: a file cannot be read, or is not what its parameter needs.
        """
        self._read(self._stamps())
        return [self._unused] if self._unused else []

    def password(self, host: Host) -> str:
        """Return the password for a host; empty: there is none."""
        if self._address.password:
            return self._address.password
        self._refresh()
        # Sockets are localhost there, as for libpq.
        name = "localhost" if host.is_socket else host.name
        wanted = (name, str(host.port), self._address.database, self._address.user)
        for line in self._passwords:
            if all(one in {"*", value} for one, value in zip(line, wanted, strict=False)):
                return line[-1]
        return ""

    def context(self, host: Host) -> ssl.SSLContext:
        """Return the context for connections to a host."""
        self._refresh()
        context = self._contexts.get(host)
        if context is None:
            context = self._contexts[host] = self._new_context(host)
        return context

    def _refresh(self) -> None:
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            self._read(stamps)
        except AddressError as exc:
            if self._seen is None:
                raise
            # Perhaps only one of two files is replaced yet. The next connection looks again.
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                log.error("postgres_files_reload_failed", extra={"error": str(exc)})

    def _read(self, stamps: list[tuple[int, ...] | None]) -> None:
        passwords = self._read_passwords()
        contexts = {}
        if self._address.tls.mode != "disable":
            contexts = {host: self._new_context(host) for host in self._address.hosts if not host.is_socket}
        self._contexts, self._passwords = contexts, passwords
        if self._seen is not None:
            log.info("postgres_files_reloaded", extra={"files": ", ".join(self._paths())})
        self._seen, self._complaint = stamps, ""

    def _paths(self) -> list[str]:
        named = self._address.files() | ({"passfile": self._passfile} if self._passfile else {})
        return list(named.values())

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [stamp_of(path) for path in self._paths()]

    def _new_context(self, host: Host) -> _HostContext:
        tls = self._address.tls
        context = _HostContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion[tls.oldest.replace(".", "_")]
        if tls.newest:
            context.maximum_version = ssl.TLSVersion[tls.newest.replace(".", "_")]
        context.check_hostname = tls.mode == "verify-full"
        if not tls.root:
            context.verify_mode = ssl.CERT_NONE
        elif tls.root == "system":
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        for parameter, path in self._address.files().items():
            if parameter in _TLS_PARAMETERS:
                _check(parameter, path)
                _load(context, self._address, parameter, path)
        if tls.revoked:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        context.host = host.name if tls.names_host or context.check_hostname else None
        # PostgreSQL 17 needs it for a direct start of TLS.
        context.set_alpn_protocols(["postgresql"])
        return context

    def _read_passwords(self) -> list[list[str]]:
        if not self._passfile:
            return []
        try:
            text = text_of(read_bytes(self._passfile, holds_secret=True))
        except FileRefused as exc:
            if self._is_default:
                # No error: the server may need no password, or another one's file is found.
                self._unused = f"{self._passfile} is not used: {exc}"
                return []
            raise AddressError(f"its passfile, {self._passfile}: {exc}") from None
        lines = (line.strip() for line in text.splitlines())
        found = [_fields(line) for line in lines if line and not line.startswith("#")]
        if not self._is_default and not any(len(one) == _PGPASS_FIELDS for one in found):
            raise AddressError(f"its passfile, {self._passfile}: no line is host:port:database:user:password")
        return [one for one in found if len(one) == _PGPASS_FIELDS]


def _fields(line: str) -> list[str]:
    # A backslash escapes a colon and itself.
    found = re.findall(r"((?:\\.|[^:\\])*)(?::|$)", line)[:_PGPASS_FIELDS]
    return [re.sub(r"\\(.)", r"\1", one) for one in found]


def _check(parameter: str, path: str) -> None:
    try:
        content = read_bytes(path, holds_secret=parameter in _SECRET_FILES)
    except FileRefused as exc:
        raise AddressError(f"its {parameter}, {path}: {exc}") from None
    if not any(mark in content for mark in _MARKS[parameter]):
        what = {"sslkey": "private key", "sslcrl": "list of revoked certificates"}.get(
            parameter, "certificate"
        )
        raise AddressError(f"its {parameter}, {path}: it has no {what} in PEM form")


def _load(context: ssl.SSLContext, address: Address, parameter: str, path: str) -> None:
    tls = address.tls
    try:
        if parameter in {"sslrootcert", "sslcrl"}:
            context.load_verify_locations(path)
        elif parameter == "sslkey":
            context.load_cert_chain(tls.certificate, tls.key, _Password(tls.key_password))
    except (OSError, ValueError) as exc:
        named = path
        if parameter == "sslkey":
            named = f"{path}, with sslcert, {tls.certificate}"
        reason = _reason(exc)
        if parameter == "sslkey" and tls.key_password and reason == _NO_PEM:
            reason = "sslpassword is not its password"
        raise AddressError(f"its {parameter}, {named}: {reason}") from None


class _Password:
    """The password of a key; without one an encrypted key is an error, instead of a question."""

    def __init__(self, password: str) -> None:
        self._password = password

    def __call__(self) -> str:
        if not self._password:
            raise ValueError("the key is encrypted; give its password as sslpassword, or a key without one")
        return self._password


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        reason = (exc.reason or "").lower().replace("_", " ")
        return {
            "key values mismatch": "the key is not that of the certificate",
            "bad decrypt": "sslpassword is not its password",
        }.get(reason, reason or _NO_PEM)
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
