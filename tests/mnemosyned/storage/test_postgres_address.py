"""Addresses of PostgreSQL as providers, poolers and people write them: read, or refused with one line."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization

from mnemosyned.storage.postgres.address import Address, AddressError, Host, parse
from mnemosyned.storage.postgres.address_files import AddressFiles

SECRET = "hunter2-of-this-test"


def complaint(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(AddressError) as caught:
        AddressFiles(parse(text, environ or {}), environ or {}).check()
    words = str(caught.value)
    assert "hunter2" not in words
    assert "\n" not in words
    return words


def of(parameters: str) -> Address:
    return parse(f"postgres://u:{SECRET}@h/d?{parameters}", {})


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("postgres://u:p@db/d", Host(name="db", port=5432)),
        ("postgresql://u:p@db:6432/d", Host(name="db", port=6432)),
        ("postgres://u:p@[::1]:5433/d", Host(name="::1", port=5433)),
        ("postgres://u:p@[fe80::1%25eth0]/d", Host(name="fe80::1%eth0", port=5432)),
        ("postgres://u:p@%2Frun%2Fpg/d", Host(name="/run/pg", port=5432)),
        ("postgres:///d?host=/run/pg&port=5434", Host(name="/run/pg", port=5434)),
        # As Cloud SQL's documents have it: the parameter wins.
        ("postgres://u:p@localhost/d?host=/cloudsql/a:b:c", Host(name="/cloudsql/a:b:c", port=5432)),
        ("postgres://u:p@db/d?hostaddr=10.0.0.7", Host(name="db", port=5432, hostaddr="10.0.0.7")),
        (" postgres://u:p@db/d\n", Host(name="db", port=5432)),
    ],
)
def test_a_host_is_read_as_libpq_reads_it(text: str, host: Host) -> None:
    assert parse(text, {}).hosts == (host,)


def test_several_hosts_have_each_its_port() -> None:
    assert list(map(str, parse("postgres://a,b:6432,[::1]/d", {}).hosts)) == [
        "a:5432",
        "b:6432",
        "[::1]:5432",
    ]
    assert list(map(str, parse("postgres://a,b/d?port=7000", {}).hosts)) == ["a:7000", "b:7000"]
    assert list(map(str, parse("postgres:///d?host=a,b&port=7000,7001", {}).hosts)) == ["a:7000", "b:7001"]


@pytest.mark.parametrize("password", ["a@b", "a:b", "a@b:c@d", "ä-ö", "a;b&c=d", "a,b"])
def test_a_password_with_characters_that_no_host_has_is_read_as_it_is(password: str) -> None:
    found = parse(f"postgres://u:{password}@db/d", {})

    assert (found.user, found.password, found.hosts[0].name) == ("u", password, "db")


def test_an_encoded_password_is_decoded() -> None:
    password = "@:/?#% +hunter2"
    found = parse(f"postgres://u%40corp:{quote(password, safe='')}@db/d%2Fe", {})

    assert (found.user, found.password, found.database) == ("u@corp", password, "d/e")
    assert password not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("postgress://u:hunter2@h/d", "does not start with postgres:// or postgresql://"),
        ("jdbc:postgresql://h/d", "does not start with"),
        ("postgresql+asyncpg://u:hunter2@h/d", "does not start with"),
        ("host=h user=u password=hunter2", "list of keywords"),
        ("postgres://u:hun#ter2@h/d", "has a #"),
        ("postgres://u:hunter2/x@h/d", "an @ after the first /"),
        ("postgres://u:12/hunter2@h/d", "an @ after the first /"),
        ("postgres://u:hunter2?x@h/d", "percent-encoded"),
        ("postgres://u:12?hunter2=x@h/d", "an @ after the first ?"),
        ("postgres://u:hunter2%zz@h/d", "write a % as %25"),
        ("postgres://u:hunter2%@h/d", "write a % as %25"),
        ("postgres://u:hunter2 x@h/d", "space"),
        ("postgres://u:hunter2\nx@h/d", "line break"),
        ("postgres://u:hunter2@h:0/d", "its port is not a number from 1 to 65535"),
        ("postgres://u:hunter2@h:65536/d", "its port is not a number from 1 to 65535"),
        ("postgres://u:hunter2@h:543x/d", "its port is not a number from 1 to 65535"),
        ("postgres://u:hunter2@h/d?port=x", "parameter port is not a number from 1 to 65535"),
        ("postgres://u:hunter2@::1/d", "an IPv6 address is written as [::1]:5432"),
        ("postgres://u:hunter2@[::1/d", "an IPv6 address is written as [::1]:5432"),
        ("postgres://u:hunter2@a,,b/d", "one of its hosts is not a name"),
        ("postgres://u:hunter2@a,b/d?port=1,2,3", "3 ports for 2 hosts"),
        ("postgres://u:hunter2@a,b/d?hostaddr=10.0.0.1", "1 addresses in hostaddr for 2 hosts"),
        ("postgres://u:hunter2@h/d/e", "its database has a /"),
        ("postgres://u:hunter2@h/d?sslmode", "its parameter sslmode has no value"),
        ("postgres://u:hunter2@h/d?hunter2", "a parameter after the ? has no value"),
        ("postgres://u:hunter2@h/d?sslmode=require&sslmode=disable", "its parameter sslmode is given twice"),
    ],
)
def test_a_url_with_a_mistake_is_refused_and_nothing_of_it_is_quoted(text: str, words: str) -> None:
    assert words in complaint(text)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("nonsense=1", "its parameter nonsense is not known"),
        ("slmode=require", "its parameter slmode is not known; perhaps sslmode"),
        ("SSLMODE=require", "its parameter SSLMODE is not known; perhaps sslmode"),
        ("sslmode=requrie", "its parameter sslmode is not one of disable, allow, prefer, require"),
        ("channel_binding=require", "its parameter channel_binding cannot be require"),
        ("gssencmode=require", "its parameter gssencmode cannot be require"),
        ("require_auth=scram-sha-256", "its parameter require_auth cannot be used"),
        ("requirepeer=postgres", "its parameter requirepeer cannot be used"),
        ("sslcrldir=/x", "its parameter sslcrldir cannot be used"),
        ("sslcrl=/x", "its parameter sslcrl needs sslmode=verify-full and sslrootcert"),
        ("sslaccept=strict", "its parameter sslaccept cannot be strict: use sslmode=verify-full"),
        ("sslinline=true", "its parameter sslinline cannot be used"),
        ("sslmode=verify-full", "its parameter sslmode is verify-full, which needs sslrootcert"),
        ("sslrootcert=system&sslmode=require", "its parameter sslmode cannot be require with sslrootcert"),
        ("sslnegotiation=direct", "its parameter sslnegotiation needs sslmode=require"),
        ("sslnegotiation=no", "its parameter sslnegotiation is not one of"),
        ("sslkey=/x", "its parameter sslkey needs sslcert"),
        ("ssl=false", "its parameter ssl is known with the value true only"),
        ("ssl_min_protocol_version=TLSv1", "its parameter ssl_min_protocol_version is not one of TLSv1.2"),
        ("replication=database", "its parameter replication cannot be used"),
        ("client_encoding=LATIN1", "its parameter client_encoding cannot be used"),
        ("target_session_attrs=standby", "its parameter target_session_attrs cannot be standby"),
        ("target_session_attrs=leader", "its parameter target_session_attrs is not one of"),
        ("load_balance_hosts=yes", "its parameter load_balance_hosts is not one of"),
        ("keepalives_idle=soon", "its parameter keepalives_idle is not a whole number"),
        ("service=one", "its service one, in .pg_service.conf: No such file"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_name_of_the_parameter(
    parameters: str, words: str
) -> None:
    assert words in complaint(f"postgres://u:hunter2@h/d?{parameters}")


@pytest.mark.parametrize(
    "parameters",
    [
        "channel_binding=prefer", "gssencmode=disable", "connect_timeout=10", "sslcompression=0",
        "client_encoding=UTF8", "replication=false", "pgbouncer=true", "pool_max_conns=10",
        "pool_timeout=5", "connection_limit=1", "schema=public", "sslaccept=accept_invalid_certs",
        "statement_cache_size=0", "prepared_statements=false", "prepare_threshold=0", "pool_min_conns=1",
        "binary_parameters=yes", "default_query_exec_mode=simple_protocol", "supa=base-pooler.x",
        "uselibpqcompat=true", "gssdelegation=0", "max_protocol_version=3.0", "jit=on", "statement_timeout=5",
    ],
)  # fmt: skip
def test_what_has_no_meaning_here_is_dropped_with_a_word(parameters: str) -> None:
    name = parameters.partition("=")[0]
    found = of(parameters)

    assert list(found.dropped) == [name]
    assert found.dropped[name]


def test_what_has_a_meaning_is_honoured() -> None:
    found = of(
        "application_name=a&options=-c%20geqo%3Doff&search_path=x&TimeZone=UTC&myapp.tenant=3&keepalives_idle=9"
        "&tcp_user_timeout=5000&target_session_attrs=primary&load_balance_hosts=random&sslsni=0&krbsrvname=k"
    )

    assert found.settings == {
        "application_name": "a", "search_path": "x", "TimeZone": "UTC", "myapp.tenant": "3",
    }  # fmt: skip
    assert found.options == "-c geqo=off"
    assert found.keepalives == {"keepalives_idle": 9, "tcp_user_timeout": 5000}
    assert (found.target, found.is_balanced, found.tls.names_host) == ("primary", True, False)
    assert found.kerberos == {"krbsrvname": "k"}
    assert not found.dropped


@pytest.mark.parametrize(
    ("parameters", "mode"),
    [
        ("", "prefer"),
        ("ssl=true", "require"),
        ("requiressl=1", "require"),
        ("sslrootcert=system", "verify-full"),
    ],
)
def test_the_mode_of_tls_has_the_defaults_of_libpq(parameters: str, mode: str) -> None:
    assert of(parameters).tls.mode == mode


def test_variables_fill_in_what_the_address_leaves_out() -> None:
    environ = {
        "PGHOST": "db", "PGPORT": "6432", "PGUSER": "u", "PGPASSWORD": SECRET, "PGDATABASE": "d",
        "PGSSLMODE": "require", "PGAPPNAME": "a",
    }  # fmt: skip
    found = parse("postgres://", environ)
    other = parse("postgres://v:p@other/e?sslmode=disable", environ)

    assert str(found) == "db:6432, database d, user u"
    assert (found.password, found.tls.mode, found.settings["application_name"]) == (SECRET, "require", "a")
    assert (other.user, other.password, other.database, other.tls.mode) == ("v", "p", "e", "disable")


def test_a_variable_that_cannot_be_used_is_named() -> None:
    assert complaint("postgres://h/d", {"PGSSLMODE": "hunter2"}).startswith(
        "variable PGSSLMODE is not one of"
    )
    assert complaint("postgres://h/d", {"PGREQUIREAUTH": "md5"}).startswith("variable PGREQUIREAUTH cannot")


def test_a_service_fills_in_what_the_address_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "services"
    file.write_text(
        f"# a comment\n[main]\nhost=db\nuser=u\npassword={SECRET}\nsslmode=require\n[odd]\nnope=1\n"
    )
    file.chmod(0o600)
    environ = {"PGSERVICEFILE": str(file), "PGHOST": "elsewhere"}
    found = parse("postgres:///d?service=main", environ)

    assert str(found) == "db:5432, database d, user u"
    assert (found.password, found.tls.mode) == (SECRET, "require")
    assert f"its service no is not in {file}" in complaint("postgres:///d?service=no", environ)
    assert "its parameter nope is not known" in complaint("postgres:///d?service=odd", environ)
    assert "is not in" in complaint("postgres:///d", environ | {"PGSERVICE": "no"})


def test_a_passfile_is_asked_for_the_host_port_database_and_user(tmp_path: Path) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"# x\nother:*:*:*:no\nh:5432:d:u:hunter2\\:with\\\\both\n*:*:*:*:{SECRET}\n")
    file.chmod(0o600)
    address = parse(f"postgres://u@h,g/d?passfile={file}", {})
    files = AddressFiles(address, {})

    assert [files.password(host) for host in address.hosts] == ["hunter2:with\\both", SECRET]


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0, "No such file or directory"),
        ("h:5432:d:u:hunter2", 0o622, "other users may write it"),
        ("hunter2", 0o600, "no line is host:port:database:user:password"),
    ],
)
def test_an_unusable_passfile_is_named(tmp_path: Path, content: str | None, mode: int, words: str) -> None:
    file = tmp_path / "pgpass"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)

    assert f"its passfile, {file}: {words}" in complaint(f"postgres://u@h/d?passfile={file}")


def test_a_default_passfile_that_others_may_write_is_not_used_and_named(tmp_path: Path) -> None:
    file = tmp_path / ".pgpass"
    file.write_text(f"*:*:*:*:{SECRET}\n")
    file.chmod(0o666)
    environ = {"HOME": str(tmp_path)}
    address = parse("postgres://u@h/d", environ)
    files = AddressFiles(address, environ)
    (text,) = files.check()

    assert text.startswith(f"{file} is not used: other users may write it")
    assert files.password(address.hosts[0]) == ""


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with valid files, and with files that are wrong."""
    authority = Authority(tmp_path_factory.mktemp("pems"))
    directory = authority.issue("client")
    other = authority.issue("other", at="other")
    (directory / "ca.pem").write_bytes(authority.pem)
    (directory / "other-key.pem").write_bytes((other / "key.pem").read_bytes())
    (directory / "empty.pem").write_text("")
    (directory / "text.pem").write_text("hunter2")
    (directory / "cut.pem").write_bytes((directory / "crt.pem").read_bytes()[:200])
    (directory / "folder.pem").mkdir()
    key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
    (directory / "locked-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(SECRET.encode()),
        )
    )
    (directory / "open-key.pem").write_bytes((directory / "key.pem").read_bytes())
    for path in directory.glob("*key.pem"):
        path.chmod(0o600)
    (directory / "open-key.pem").chmod(0o666)
    return directory


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"sslcert": "no.pem"}, "its sslcert, {}/no.pem: No such file or directory"),
        ({"sslcert": "folder.pem"}, "its sslcert, {}/folder.pem: it is a directory"),
        ({"sslcert": "empty.pem"}, "its sslcert, {}/empty.pem: it has no certificate in PEM form"),
        ({"sslcert": "text.pem"}, "its sslcert, {}/text.pem: it has no certificate in PEM form"),
        ({"sslcert": "cut.pem"}, "its sslkey, {}/key.pem, with sslcert, {}/cut.pem: "),
        ({"sslkey": "no-key.pem"}, "its sslkey, {}/no-key.pem: No such file or directory"),
        ({"sslkey": "crt.pem"}, "its sslkey, {}/crt.pem: it has no private key in PEM form"),
        ({"sslkey": "open-key.pem"}, "its sslkey, {}/open-key.pem: other users may write it"),
        ({"sslkey": "other-key.pem"}, "the key is not that of the certificate"),
        ({"sslkey": "locked-key.pem"}, "the key is encrypted; give its password as sslpassword"),
        ({"sslkey": "locked-key.pem", "sslpassword": "no"}, "sslpassword is not its password"),
        ({"sslrootcert": "no.pem"}, "its sslrootcert, {}/no.pem: No such file or directory"),
        ({"sslrootcert": "key.pem"}, "its sslrootcert, {}/key.pem: it has no certificate in PEM form"),
        ({"sslcrl": "no.pem"}, "its sslcrl, {}/no.pem: No such file or directory"),
        ({"sslcrl": "ca.pem"}, "its sslcrl, {}/ca.pem: it has no list of revoked certificates in PEM form"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_used_is_named_with_its_parameter(
    pems: Path, named: dict[str, str], words: str
) -> None:
    files = {"sslrootcert": "ca.pem", "sslcert": "crt.pem", "sslkey": "key.pem"} | named
    parameters = "&".join(
        f"{name}={file if name == 'sslpassword' else pems / file}" for name, file in files.items()
    )

    assert words.replace("{}", str(pems)) in complaint(
        f"postgres://u:hunter2@h/d?sslmode=verify-full&{parameters}"
    )


@pytest.mark.parametrize("mode", ["", "sslmode=allow&", "sslmode=prefer&", "sslmode=require&"])
def test_a_root_certificate_is_read_whatever_else_the_address_says_of_tls(pems: Path, mode: str) -> None:
    address = f"postgres://u:hunter2@h/d?{mode}sslrootcert={pems}"

    assert f"its sslrootcert, {pems}/no.pem: No such file" in complaint(f"{address}/no.pem")
    assert parse(f"{address}/ca.pem", {}).tls.root == f"{pems}/ca.pem"


def test_an_encrypted_key_is_opened_with_its_password(pems: Path) -> None:
    found = of(
        f"sslmode=verify-full&sslrootcert={pems}/ca.pem&sslcert={pems}/crt.pem&sslkey={pems}/locked-key.pem"
        f"&sslpassword={SECRET}"
    )
    context = AddressFiles(found, {}).context(found.hosts[0])

    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert SECRET not in repr(found)


def test_the_files_of_libpq_in_the_home_directory_are_used(pems: Path, tmp_path: Path) -> None:
    directory = tmp_path / ".postgresql"
    directory.mkdir()
    for source, name in (("ca", "root.crt"), ("crt", "postgresql.crt"), ("key", "postgresql.key")):
        (directory / name).write_bytes((pems / f"{source}.pem").read_bytes())
        (directory / name).chmod(0o600)
    found = parse("postgres://u:p@h/d?sslmode=verify-full", {"HOME": str(tmp_path)})

    assert found.files() == {
        "sslrootcert": f"{directory}/root.crt",
        "sslcert": f"{directory}/postgresql.crt",
        "sslkey": f"{directory}/postgresql.key",
    }
    AddressFiles(found, {}).check()


def test_new_files_are_taken_and_an_unusable_one_costs_only_the_change(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    directory = authority.issue("client")
    (directory / "key.pem").chmod(0o600)
    found = of(f"sslmode=require&sslcert={directory}/crt.pem&sslkey={directory}/key.pem")
    files, host = AddressFiles(found, {}), found.hosts[0]
    first = files.context(host)
    assert files.context(host) is first

    (directory / "crt.pem").write_text("hunter2")
    assert files.context(host) is first
    authority.issue("client")
    assert files.context(host) is not first
