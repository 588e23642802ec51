"""Authorities and certificates for tests, made for each."""

from __future__ import annotations

from pathlib import Path

import grpc
import trustme

from mnemosyned.security.tls import ClientAuth, TlsFiles


class Authority:
    """Signs certificates, and writes them where a daemon looks for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._authority = trustme.CA()
        self.pem = self._authority.cert_pem.bytes()
        self.path = directory / "ca.pem"
        self.path.write_bytes(self.pem)

    def issue(self, *names: str, at: str = "node") -> Path:
        """Write a certificate for these names, over an older one if there is one; return its directory."""
        directory = self.directory / at
        directory.mkdir(exist_ok=True)
        identity = self._authority.issue_cert(*names)
        # As a program that renews them does it: never half of one, but one before the other.
        for name, pem in (
            ("crt.pem", b"".join(one.bytes() for one in identity.cert_chain_pems)),
            ("key.pem", identity.private_key_pem.bytes()),
        ):
            new = directory / f"{name}.new"
            new.write_bytes(pem)
            new.rename(directory / name)
        return directory

    def files(self, *names: str, at: str = "node", client_auth: ClientAuth = ClientAuth.NONE) -> TlsFiles:
        """Write a certificate for these names; return where it is."""
        directory = self.issue(*names, at=at)
        return TlsFiles(
            certificate=str(directory / "crt.pem"),
            private_key=str(directory / "key.pem"),
            authorities=str(self.path),
            client_auth=client_auth,
        )

    def flags(self, *names: str, at: str = "node") -> list[str]:
        """Write a certificate for these names; return the flags for it."""
        files = self.files(*names, at=at)
        return [
            "-tls",
            f"-tls.crt={files.certificate}",
            f"-tls.key={files.private_key}",
            f"-tls.ca={self.path}",
        ]

    def credentials(self, *names: str) -> grpc.ChannelCredentials:
        """What a client dials with: a certificate for these names, or none."""
        if not names:
            return grpc.ssl_channel_credentials(self.pem)
        directory = self.issue(*names, at="client")
        key, chain = (directory / "key.pem").read_bytes(), (directory / "crt.pem").read_bytes()
        return grpc.ssl_channel_credentials(self.pem, key, chain)
