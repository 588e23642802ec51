"""Files with secrets, as users name them: at the start, by `-check-config`, and when they are replaced."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Authority
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from processes import Daemon, mnemosyned

from mnemosyned.security.api_keys import Role, line_of, new_key

MEMORY = "-storage=memory"


def check(*flags: str, **environ: str) -> tuple[int, str, str]:
    return mnemosyned("-check-config", MEMORY, *flags, **environ)


def write(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def issue(path: Path, *, begins_days: int, ends_days: int) -> list[str]:
    """Write a certificate of its own authority; return the flags for it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(tz=UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node.example")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=begins_days))
        .not_valid_after(now + timedelta(days=ends_days))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    write(path / "crt.pem", certificate.public_bytes(pem), 0o644)
    plain = serialization.NoEncryption()
    write(path / "key.pem", key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return ["-tls", f"-tls.crt={path / 'crt.pem'}", f"-tls.key={path / 'key.pem'}"]


def test_a_valid_configuration_is_valid_without_a_warning(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    flags = authority.flags("node.example")
    (tmp_path / "node" / "key.pem").chmod(0o600)
    keys = write(tmp_path / "keys", line_of(new_key(), Role.SESSION))

    assert check(*flags, f"-auth.keys={keys}") == (0, "the configuration is valid\n", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "line 1: it is not a role"),
        ("", "no callers"),
        (b"\x80\xff\x00", "it is not UTF-8"),
        (b"session \0", "line 1 has a NUL byte"),
        ("\ufeffsession x", "byte order mark"),
        ("# \x1b[31m", "line 1 has a control character"),
        ("#" * 5_000_000, "larger than"),
    ],
)
def test_an_unusable_file_of_callers_is_refused(tmp_path: Path, content: str | bytes, words: str) -> None:
    keys = write(tmp_path / "keys", content)
    code, out, err = check(f"-auth.keys={keys}")

    assert (code, out) == (2, "")
    assert err.startswith(f"mnemosyned: flag -auth.keys: {keys}")
    assert words in err
    assert err.count("\n") == 1
    with Daemon(MEMORY, f"-auth.keys={keys}") as daemon:
        assert daemon.end() == 1
    (line,) = map(json.loads, daemon.lines)
    assert (line["msg"], f"mnemosyned: {line['error']}\n") == ("start_failed", err)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "missing"])
@pytest.mark.parametrize(
    "flag", ["auth.keys", "tls.crt", "tls.key", "tls.ca", "cluster.secret.file", "token.key.file", "config"]
)
def test_what_is_no_file_is_refused_by_every_flag_at_once(tmp_path: Path, flag: str, kind: str) -> None:
    path = {"directory": tmp_path, "device": Path("/dev/zero")}.get(kind, tmp_path / "one")
    if kind == "fifo":
        os.mkfifo(path)
    flags = dict.fromkeys(("tls.crt", "tls.key"), str(write(tmp_path / "x", "x"))) | {flag: str(path)}
    code, out, err = check(
        *(["-tls"] if flag.startswith("tls") else []),
        *(f"-{name}={value}" for name, value in flags.items() if name[:3] == flag[:3] or name == flag),
    )

    assert (code, out) == (2, "")
    assert {"fifo": "it is a FIFO", "missing": "No such file"}.get(kind, f"it is a {kind}") in err
    assert err.count("\n") == 1


def test_tls_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    flags = authority.flags("node.example")
    other = authority.issue("other.example", at="other") / "key.pem"
    nonsense = write(tmp_path / "nonsense", "nonsense")
    marked = write(tmp_path / "marked", b"\xef\xbb\xbf" + (tmp_path / "node" / "crt.pem").read_bytes())

    for flag, words in (
        (f"-tls.key={other}", "key values mismatch"),
        (f"-tls.ca={nonsense}", "nonsense: no certificate or crl found"),
        (f"-tls.crt={nonsense}", "nonsense"),
        (f"-tls.crt={marked}", "byte order mark"),
    ):
        code, out, err = check(*flags, flag)
        assert (code, out) == (2, "")
        assert err.startswith("mnemosyned: flag -tls: ")
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("days", "words"), [((-9, -1), "the certificate expired at"), ((1, 9), "the certificate is valid from")]
)
def test_a_certificate_that_no_client_accepts_is_an_error_and_the_daemon_says_so(
    tmp_path: Path, days: tuple[int, int], words: str
) -> None:
    flags = issue(tmp_path, begins_days=days[0], ends_days=days[1])
    code, _, err = check(*flags)

    assert code == 2
    assert words in err
    with Daemon(MEMORY, *flags) as daemon:
        assert words in daemon.wait_for("tls_certificate_not_valid_now")["error"]


def test_authorities_that_have_all_expired_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    issue(tmp_path / "old", begins_days=-9, ends_days=-1)
    flags = issue(tmp_path, begins_days=-1, ends_days=9)
    old, new = tmp_path / "old" / "crt.pem", tmp_path / "crt.pem"
    both = write(tmp_path / "both", old.read_bytes() + new.read_bytes())

    assert "all its certificates have expired" in check(*flags, f"-tls.ca={old}")[2]
    assert check(*flags, f"-tls.ca={both}")[0] == 0


def test_an_expired_certificate_does_not_replace_a_valid_one(tmp_path: Path) -> None:
    flags = issue(tmp_path, begins_days=-1, ends_days=9)
    with Daemon(MEMORY, *flags) as daemon:
        daemon.wait_for("storage_ready")
        issue(tmp_path, begins_days=-9, ends_days=-1)

        assert "expired" in daemon.wait_for("tls_reload_failed")["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="its files are root's")
def test_what_others_may_read_is_a_warning_with_the_remedy(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", line_of(new_key(), Role.SESSION), 0o644)
    config = write(tmp_path / "c.yaml", f"auth.keys: {keys}\ncluster.secret: {'x' * 32}\n", 0o604)
    code, out, err = check(f"-config={config}")

    assert (code, out) == (0, "the configuration is valid\n")
    for flag, path in (("config", config), ("auth.keys", keys)):
        assert f"warning: flag -{flag}: {path}: secret file readable by others; chmod 600 {path}" in err
    with Daemon(MEMORY, f"-config={config}") as daemon:
        first = daemon.wait_for("secret_file_readable_by_others")
        second = daemon.wait_for("secret_file_readable_by_others")

    assert (first["file"], first["advice"]) == (str(config), f"chmod 600 {config}")
    assert (second["file"], second["used_for"]) == (str(keys), "-auth.keys")


def test_a_reload_keeps_to_the_rules_of_the_start(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", line_of(new_key(), Role.SESSION))
    flags = Authority(tmp_path).flags("node.example")
    key = tmp_path / "node" / "key.pem"
    key.chmod(0o600)
    with Daemon(MEMORY, f"-auth.keys={keys}", *flags) as daemon:
        daemon.wait_for("storage_ready")
        for path, name in ((keys, "keys"), (key, "tls")):
            path.chmod(0o666)
            assert "other users may write it" in daemon.wait_for(f"{name}_reload_failed")["error"]
            path.chmod(0o604)
            daemon.wait_for(f"{name}_reloaded")
            assert daemon.wait_for("secret_file_readable_by_others")["file"] == str(path)
        keys.unlink()
        os.mkfifo(keys)
        assert "it is a FIFO" in daemon.wait_for("keys_reload_failed")["error"]
        assert daemon.stop() == 0
