from __future__ import annotations

import asyncio
import logging
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mnemosyned.security.certificates import names_of, validity_s
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable
from mnemosyned.security.tls import (
    TlsFiles,
    TlsMaterial,
    admin_context,
    client_context,
    tls_reloader,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_certificate_is_for_names_and_addresses(authority: Authority) -> None:
    pem = (authority.issue("a.example", "*.b.example", "10.0.0.1") / "crt.pem").read_text()

    assert names_of(pem) == ("a.example", "*.b.example", "10.0.0.1")
    assert time.time() < validity_s(pem.encode())[1]


def test_without_such_names_the_common_name_counts() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "only.example")])
    now = datetime.now(tz=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())

    assert names_of(certificate.public_bytes(serialization.Encoding.PEM).decode()) == ("only.example",)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_has_no_names(text: str) -> None:
    assert names_of(text) == ()


def test_the_files_are_read_together(authority: Authority) -> None:
    material = authority.files("a.example").read()

    assert material.authorities == authority.pem
    assert material.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
    assert time.time() < material.expires_at_s
    assert "PRIVATE" not in repr(material)


@pytest.mark.parametrize("damaged", ["certificate", "private_key", "authorities"])
@pytest.mark.parametrize("content", [None, "", "nonsense"])
def test_an_invalid_file_is_named(authority: Authority, damaged: str, content: str | None) -> None:
    files = authority.files("a.example")
    path = Path(getattr(files, damaged))
    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    with pytest.raises(FilesUnusable, match=path.name) as caught:
        files.read()
    assert "\n" not in str(caught.value)


def test_a_key_must_be_the_certificates(authority: Authority) -> None:
    files, other = authority.files("a.example"), authority.files("b.example", at="other")
    mixed = TlsFiles(certificate=files.certificate, private_key=other.private_key)

    with pytest.raises(FilesUnusable, match="key values mismatch"):
        mixed.read()


def test_an_encrypted_key_is_refused_and_nobody_asked(tmp_path: Path, authority: Authority) -> None:
    files = authority.files("a.example")
    key = serialization.load_pem_private_key(Path(files.private_key).read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "encrypted.pem").write_bytes(encrypted)

    with pytest.raises(FilesUnusable, match="encrypted"):
        TlsFiles(certificate=files.certificate, private_key=str(tmp_path / "encrypted.pem")).read()


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def replace(path: str, new: bytes) -> None:
    Path(path).write_bytes(new)


class Follower:
    """Takes what it is told to serve, or says that it is no good."""

    def __init__(self) -> None:
        self.served: list[TlsMaterial] = []
        self.refuses = False

    async def follow(self, material: TlsMaterial) -> None:
        if self.refuses:
            raise FilesUnusable("not now")
        self.served.append(material)


async def test_changed_files_are_served_once(authority: Authority) -> None:
    files = authority.files("a.example")
    watch, follower = tls_reloader(files), Follower()
    watch.followers.append(follower.follow)
    await watch.look()
    assert follower.served == []
    authority.issue("b.example")
    for _ in range(3):
        await watch.look()

    assert [names_of(one.certificate.decode()) for one in follower.served] == [("b.example",)]
    assert watch.content == follower.served[0]


async def test_half_of_a_change_is_waited_for(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    files = authority.files("a.example")
    watch, follower = tls_reloader(files), Follower()
    watch.followers.append(follower.follow)
    old_key = content(files.private_key)
    authority.issue("b.example")
    new_key = content(files.private_key)
    replace(files.private_key, old_key)
    for _ in range(3):
        await watch.look()
    assert follower.served == []
    replace(files.private_key, new_key)
    await watch.look()

    assert len(follower.served) == 1
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "tls_reload_failed"
    ]


async def test_what_a_follower_refuses_is_tried_again(authority: Authority) -> None:
    files = authority.files("a.example")
    watch, follower = tls_reloader(files), Follower()
    watch.followers.append(follower.follow)
    authority.issue("b.example")
    follower.refuses = True
    await watch.look()
    follower.refuses = False
    await watch.look()

    assert len(follower.served) == 1


def test_the_admin_ports_context_speaks_no_old_tls(authority: Authority) -> None:
    assert admin_context(authority.files("a.example")).minimum_version == ssl.TLSVersion.TLSv1_2


def test_what_openssl_takes_and_we_cannot_read_is_named(authority: Authority) -> None:
    files = authority.files("a.example")
    path = Path(files.certificate)
    path.write_text(path.read_text().replace("CERTIFICATE-----", "TRUSTED CERTIFICATE-----"))

    with pytest.raises(FilesUnusable, match=r"crt\.pem"):
        files.read()


async def test_a_bug_in_a_reader_does_not_end_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.security.file_reloader._PERIOD_S", 0.01)
    replace(str(tmp_path / "file"), b"1")
    reads = []

    def read() -> int:
        reads.append(1)
        if len(reads) == 2:
            raise RuntimeError("a bug")
        return len(reads)

    watch = FileReloader("test", [str(tmp_path / "file")], read)
    running = asyncio.create_task(watch.run())
    replace(str(tmp_path / "file"), b"22")
    async with asyncio.timeout(5):
        while watch.content != 3:
            await asyncio.sleep(0.01)
    running.cancel()

    assert "reload_failed" in [record.message for record in caplog.records]


def test_a_client_believes_the_authorities_it_is_given(authority: Authority, tmp_path: Path) -> None:
    assert client_context(str(authority.path)).verify_mode == ssl.CERT_REQUIRED
    assert client_context("").verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(FilesUnusable, match="No such file"):
        client_context(str(tmp_path / "absent"))
