"""The files that TLS needs, read together and checked before anything uses them.

Whoever replaces them on disk need not restart the daemon: `TlsWatch` looks once a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from mnemosyned.certificates import expires_at_s

log = logging.getLogger(__name__)

_PERIOD_S: Final = 1.0


class TlsUnusable(Exception):
    """The files are no good; the text tells the operator which, and why."""


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
            TlsUnusable: one cannot be read or is no PEM file, or the key is not the certificate's.
        """
        _server_context(self)
        certificate = _bytes_of(self.certificate)
        return TlsMaterial(
            certificate=certificate,
            private_key=_bytes_of(self.private_key),
            authorities=_bytes_of(self.authorities) if self.authorities else None,
            client_auth=self.client_auth,
            expires_at_s=expires_at_s(certificate),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsMaterial:
    """What the files held at one time."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    authorities: bytes | None
    client_auth: ClientAuth
    expires_at_s: float


class TlsWatch:
    """Has new files served; whoever took the old ones is in `followers`, which raise TlsUnusable."""

    def __init__(self, files: TlsFiles, material: TlsMaterial) -> None:
        self.material = material
        self.followers: list[Callable[[TlsMaterial], Awaitable[None]]] = []
        self._files = files
        self._seen = self._stamps()
        self._complaint = ""

    async def run(self) -> None:
        """Look for changes, for ever. Files that are no good are tried again until they are."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self.look()

    async def look(self) -> None:
        """Have the files served if they have changed."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            material = await asyncio.to_thread(self._files.read)
            for follow in self.followers:
                await follow(material)
        except TlsUnusable as exc:
            # Perhaps only one of them is there yet.
            if str(exc) != self._complaint:
                self._complaint = str(exc)
                log.error("tls_reload_failed", extra={"error": str(exc)})
            return
        self._seen, self._complaint, self.material = stamps, "", material
        log.info("tls_reloaded", extra={"expires_at": round(material.expires_at_s)})

    def _stamps(self) -> Sequence[tuple[int, int, int] | None]:
        files = self._files
        return [_stamp(path) for path in (files.certificate, files.private_key, files.authorities)]


def operator_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the context of the operator's port, which asks nobody for a certificate. Raises TlsUnusable."""
    return _server_context(files)


def load_again(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Serve new connections of a context with what the files hold now. Raises TlsUnusable."""
    try:
        context.load_cert_chain(files.certificate, files.private_key, _no_password)
    except (OSError, ValueError) as exc:
        raise TlsUnusable(f"{files.certificate}, {files.private_key}: {_reason(exc)}") from None


def client_context(authorities: str) -> ssl.SSLContext:
    """Return a context that believes these authorities, or the system's if empty. Raises TlsUnusable."""
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as exc:
        raise TlsUnusable(f"{authorities}: {_reason(exc)}") from None


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_again(context, files)
    if files.authorities:
        try:
            context.load_verify_locations(files.authorities)
        except OSError as exc:
            raise TlsUnusable(f"{files.authorities}: {_reason(exc)}") from None
    return context


def _no_password() -> str:
    # Else OpenSSL would ask the terminal.
    raise ValueError("the private key is encrypted")


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise TlsUnusable(f"{path}: {_reason(exc)}") from None


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # follows links, as a Kubernetes secret is made of
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return exc.reason.lower().replace("_", " ") if exc.reason else "it is no PEM file"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
