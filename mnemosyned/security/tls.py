"""The files that TLS needs, read together and checked before anything uses them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from mnemosyned.security.certificates import expires_at_s
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable


class ClientAuth(Enum):
    """Whether clients show a certificate."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where PEM files are: this node's chain and key, and the authorities that vouch for others."""

    certificate: str
    private_key: str
    authorities: str = ""
    client_auth: ClientAuth = ClientAuth.NONE

    def read(self) -> TlsMaterial:
        """Return what the files hold now, checked.

        Raises:
            FilesUnusable: one cannot be read or is no PEM file, or the key is not the certificate's.
        """
        _server_context(self)
        certificate = _bytes_of(self.certificate)
        try:
            ends_at_s = expires_at_s(certificate)
        except ValueError:
            raise FilesUnusable(f"{self.certificate}: it does not begin with a certificate") from None
        return TlsMaterial(
            certificate=certificate,
            private_key=_bytes_of(self.private_key),
            authorities=_bytes_of(self.authorities) if self.authorities else None,
            client_auth=self.client_auth,
            expires_at_s=ends_at_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsMaterial:
    """What the files held at one time."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    authorities: bytes | None
    client_auth: ClientAuth
    expires_at_s: float


def tls_reloader(files: TlsFiles) -> FileReloader[TlsMaterial]:
    """Return what the files hold, now and whenever they change. Raises FilesUnusable."""
    return FileReloader("tls", (files.certificate, files.private_key, files.authorities), files.read)


def admin_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context of the operator's port, which asks for no certificate. Raises FilesUnusable."""
    return _server_context(files)


def client_context(authorities: str) -> ssl.SSLContext:
    """Return a context that believes these authorities, or the system's if empty. Raises FilesUnusable."""
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as exc:
        raise FilesUnusable(f"{authorities}: {_reason(exc)}") from None


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.private_key, _no_password)
    except (OSError, ValueError) as exc:
        raise FilesUnusable(f"{files.certificate}, {files.private_key}: {_reason(exc)}") from None
    if files.authorities:
        try:
            context.load_verify_locations(files.authorities)
        except OSError as exc:
            raise FilesUnusable(f"{files.authorities}: {_reason(exc)}") from None
    return context


def _no_password() -> str:
    # Else OpenSSL would ask the terminal.
    raise ValueError("the private key is encrypted")


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise FilesUnusable(f"{path}: {_reason(exc)}") from None


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return exc.reason.lower().replace("_", " ") if exc.reason else "it is no PEM file"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
