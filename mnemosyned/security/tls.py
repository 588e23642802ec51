"""The files that TLS needs, read together and checked before anything uses them.

    TlsFiles (paths) ── read(), checked ──> TlsMaterial (bytes) ──┬──> the gRPC engine   (engine.py)
         ^                                                        ├──> the admin port    (`admin_context`)
         └── once a second, if they changed (file_reloader.py)    └──> dials to peers    (node.py)

Three users take the same files, and must not have different halves of a replacement. Hence the files are read
as one, and checked as one: OpenSSL loads chain, key and authorities, and compares the key with the
certificate. Only then does a user see them. A user that reads the paths itself, as the engine h2 and the
admin port do, may meet a still newer change; it then raises FilesUnusable, and the reloader tries again.

- TLS 1.2 at least; the ciphers are OpenSSL's defaults.
- `authorities` (`-tls.ca`) verify clients and peers. The admin port asks for no certificate, also if the gRPC
  port does: what scrapes metrics rarely has one.
- A private key with a password is refused: OpenSSL would ask for the password on the terminal.
- An expired certificate is served nevertheless, with a warning at the start: clients refuse it, and a metric
  shows its end beforehand. A new certificate that is not valid now does not replace a valid one.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from mnemosyned.config.files import FileRefused, read_bytes
from mnemosyned.security.certificates import latest_end_s, validity_s
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable


class ClientAuth(Enum):
    """Whether clients of the gRPC port show a certificate: `-tls.client-auth`."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """The paths of PEM files: this node's chain and key, and the authorities that verify others.

    `authorities` is empty if `-tls.ca` is not given: then no certificate is asked for, and peers are verified
    by the system's authorities.
    """

    certificate: str
    private_key: str
    authorities: str = ""
    client_auth: ClientAuth = ClientAuth.NONE

    def read(self) -> TlsMaterial:
        """Return what the files hold now, checked.

        Raises:
            FilesUnusable: a file cannot be read or is no PEM file, or the key is not the certificate's.
        """
        # OpenSSL's own checks; the context is not kept. The bytes are read after it, so a replacement in
        # between is not checked. The reloader then sees new stamps in the next second, and reads once more.
        _server_context(self)
        certificate = _content_of(self.certificate)
        try:
            begins_at_s, ends_at_s = validity_s(certificate)
        except ValueError:
            raise FilesUnusable(f"{self.certificate}: it does not begin with a certificate") from None
        return TlsMaterial(
            certificate=certificate,
            private_key=_content_of(self.private_key, holds_secret=True),
            authorities=_content_of(self.authorities) if self.authorities else None,
            client_auth=self.client_auth,
            begins_at_s=begins_at_s,
            expires_at_s=ends_at_s,
            files=self,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsMaterial:
    """The content of the files at one time; the certificate's times are in seconds since the epoch."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    authorities: bytes | None
    client_auth: ClientAuth
    begins_at_s: float
    expires_at_s: float
    files: TlsFiles  # from which it was read

    def complaint(self, now_s: float) -> str:
        """Return why clients refuse the certificate now; empty: its time is right."""
        if now_s >= self.expires_at_s:
            return f"{self.files.certificate}: the certificate expired at {_instant(self.expires_at_s)}"
        if now_s < self.begins_at_s:
            return f"{self.files.certificate}: the certificate is valid from {_instant(self.begins_at_s)}"
        return ""

    def authorities_complaint(self, now_s: float) -> str:
        """Return why no certificate can be verified now; empty: at least one authority has not expired."""
        if self.authorities is None or latest_end_s(self.authorities) > now_s:
            return ""
        return f"{self.files.authorities}: all its certificates have expired"


def tls_reloader(files: TlsFiles) -> FileReloader[TlsMaterial]:
    """Return a reloader of the files' content. Raises FilesUnusable if they are invalid now."""
    served_until_s = 0.0

    def read() -> TlsMaterial:
        nonlocal served_until_s
        material, now_s = files.read(), time.time()
        if material.complaint(now_s) and now_s < served_until_s:
            raise FilesUnusable(material.complaint(now_s))
        served_until_s = material.expires_at_s
        return material

    paths = (files.certificate, files.private_key, files.authorities)
    return FileReloader("tls", paths, read, secret_paths=[files.private_key])


def admin_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context of the admin port, which asks for no certificate. Raises FilesUnusable."""
    return _server_context(files)


def grpc_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context of the gRPC port, which asks for certificates as `client_auth` says.

    Raises:
        FilesUnusable: the files are invalid.
    """
    context = _server_context(files)
    context.verify_mode = {
        ClientAuth.NONE: ssl.CERT_NONE,
        ClientAuth.OPTIONAL: ssl.CERT_OPTIONAL,
        ClientAuth.REQUIRE: ssl.CERT_REQUIRED,
    }[files.client_auth]
    # HTTP/1.1 too, so that `curl` gets an answer that it can show.
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def peer_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context in which this node dials peers: with its certificate, and verifying theirs.

    Raises:
        FilesUnusable: the files are invalid.
    """
    _check(files)
    context = client_context(files.authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.private_key, _no_password)
    except (OSError, ValueError) as exc:
        raise FilesUnusable(f"{files.certificate}, {files.private_key}: {_reason(exc)}") from None
    context.set_alpn_protocols(["h2"])
    return context


def probe_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context in which this node calls its own port: with its certificate, verifying nothing.

    The certificate is for the node's name and not for a loopback address, and the connection does not leave
    the host.

    Raises:
        FilesUnusable: the files are invalid.
    """
    context = peer_context(files)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def client_context(authorities: str) -> ssl.SSLContext:
    """Return a context for a client that accepts certificates of these authorities.

    `authorities` is the path of a PEM file; empty: the system's authorities. Used by the commands.

    Raises:
        FilesUnusable: the file cannot be read or is no PEM file.
    """
    try:
        if authorities:
            _content_of(authorities)
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as exc:
        raise FilesUnusable(f"{authorities}: {_reason(exc)}") from None


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    _check(files)
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
    # Without a callback OpenSSL would ask on the terminal, and a daemon without one would hang.
    raise ValueError("the private key is encrypted")


def _check(files: TlsFiles) -> None:
    # OpenSSL reads the paths itself, and would wait for the writer of a FIFO.
    _content_of(files.certificate)
    _content_of(files.private_key, holds_secret=True)
    if files.authorities:
        _content_of(files.authorities)


def _content_of(path: str, *, holds_secret: bool = False) -> bytes:
    try:
        content = read_bytes(path, holds_secret=holds_secret)
    except FileRefused as exc:
        raise FilesUnusable(f"{path}: {exc}") from None
    # OpenSSL skips lines that it does not know: with a byte order mark, that of the first certificate.
    if b"\0" in content or content.startswith(b"\xef\xbb\xbf"):
        raise FilesUnusable(f"{path}: it is no PEM file: it has a NUL byte or a byte order mark")
    return content


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat()


def _reason(exc: Exception) -> str:
    # The texts of ssl.SSLError name source files of OpenSSL; its `reason` is a short constant.
    if isinstance(exc, ssl.SSLError):
        return exc.reason.lower().replace("_", " ") if exc.reason else "it is no PEM file"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
