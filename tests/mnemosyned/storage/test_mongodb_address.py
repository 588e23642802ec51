"""Addresses of MongoDB: read, or refused with one line without any secret."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Authority
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import configured

from mnemosyned.config.flags import ConfigError
from mnemosyned.storage.addresses import AddressError, Login
from mnemosyned.storage.mongodb import config as mongodb_config
from mnemosyned.storage.mongodb.address import Address, Files, parse
from mnemosyned.storage.mongodb.client import Client
from mnemosyned.storage.mongodb.config import MongoConfig

SECRET = "hunter2-of-this-test"
X509 = "tls=true&tlsCertificateKeyFile=/c&authMechanism=MONGODB-X509"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("mongodb://h", Address(hosts=("h:27017",))),
        ("mongodb://h:1/", Address(hosts=("h:1",))),
        ("mongodb://h/d", Address(hosts=("h:27017",), database="d", is_database_given=True)),
        ("mongodb://[::1],a:7", Address(hosts=("[::1]:27017", "a:7"))),
        ("mongodb://%2Frun%2Fm.sock", Address(hosts=("%2Frun%2Fm.sock",))),
        (
            f"mongodb://u%40:{SECRET}%2F%3A@h/?replicaSet=rs0&authSource=admin",
            Address(
                hosts=("h:27017",),
                login=Login(user="u@", password=f"{SECRET}/:"),
                options={"replicaSet": "rs0", "authSource": "admin"},
            ),
        ),
        (
            f"mongodb+srv://u:{SECRET}@c.example.net/d?retryWrites=true&w=majority&appName=C",
            Address(
                hosts=("c.example.net",),
                is_srv=True,
                database="d",
                is_database_given=True,
                login=Login(user="u", password=SECRET),
                options={"appName": "C"},
            ),
        ),
        (
            "mongodb://CN=d@h/?tls=true&tlsCAFile=/ca&tlsCertificateKeyFile=/c&authMechanism=mongodb-x509",
            Address(
                hosts=("h:27017",),
                login=Login(user="CN=d"),
                files=Files(cacert="/ca", cert_and_key="/c"),
                options={"tls": True, "authMechanism": "MONGODB-X509"},
            ),
        ),
        (
            f"mongodb://h/?ssl=true&tlsCertificateKeyFile=/c&tlsCertificateKeyFilePassword={SECRET}",
            Address(
                hosts=("h:27017",),
                files=Files(cert_and_key="/c", key_password=SECRET),
                options={"tls": True},
            ),
        ),
        ("mongodb://h/?j=true&readPreference=primary", Address(hosts=("h:27017",))),
    ],
)
def test_an_address_says_where_the_servers_are(text: str, address: Address) -> None:
    found = parse(text)

    assert found == address
    assert SECRET not in f"{found}{found!r}{found.url}{found.where}"


PARTS = (
    "tls=true",
    "tls=false",
    "authSource=admin",
    "authSource=$external",
    *(f"authMechanism={name}" for name in ("PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256", "MONGODB-X509")),
    "tlsCertificateKeyFile=/c",
    "replicaSet=r",
    "directConnection=true",
    "directConnection=false",
    "retryReads=false",
    f"appName={'x' * 128}",
    f"appName={'ż' * 65}",
    "srvServiceName=x",
    "srvMaxHosts=0",
    "srvMaxHosts=2",
)
HOSTS = ("a", "a,b:7", "[::1]:7", "[fe80::1%25e0]", "%2Frun%2Fm.sock", "%2frun%2fm", "%2Fa%2C.sock", "a.b.c")


@given(
    st.sampled_from(("mongodb", "mongodb+srv")),
    st.sampled_from(("", "u:p@", "u@", ":p@", "u%00:p@")),
    st.sampled_from(HOSTS),
    st.lists(st.sampled_from(PARTS), unique_by=lambda part: part.partition("=")[0], max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_the_client_takes_each_address_that_is_not_refused(
    scheme: str, login: str, hosts: str, options: list[str]
) -> None:
    try:
        address = parse(f"{scheme}://{login}{hosts}/?{'&'.join(options)}")
    except AddressError:
        return
    # The files are checked before (`check_files`), and the name in the DNS is looked up later.
    asyncio.run(Client(replace(address, files=Files()), connections=2, connect_timeout_s=1).close())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SECRET, "it is not a URL"),
        (f"http://{SECRET}", "its scheme is not one of mongodb, mongodb+srv"),
        (f"mongodb://{SECRET}@h", "a user without a password"),
        (f"mongodb://:{SECRET}@h", "a user without a password"),
        (f"mongodb://u:{SECRET}", "a host is missing or wrong"),
        (f"mongodb://u:{SECRET}/x@h", "a host is missing or wrong"),
        (f"mongodb://u:{SECRET}?x@h", "it has an option that is not one of tls"),
        (f"mongodb://h?{SECRET}=1&{SECRET}=2", "it has an option that is not one of tls"),
        (f"mongodb://u%0a:{SECRET}@h", "its user or password has a control character"),
        (f"mongodb://u:{SECRET}%00@h", "its user or password has a control character"),
        ("mongodb://h:0", "a host is missing or wrong"),
        ("mongodb://h:99999", "a host is missing or wrong"),
        ("mongodb://h/a.b", "its database is not a name of 1 to 63 bytes"),
        (f"mongodb://h/{'d' * 64}", "its database is not a name of 1 to 63 bytes"),
        ("mongodb://h/?tls=yes", "its option tls is neither true nor false"),
        ("mongodb://h/?tls=true&SSL=true", "it has the option tls twice"),
        ("mongodb://h/?replicaSet=", "its option replicaSet is empty"),
        ("mongodb://h/?authMechanism=GSSAPI", "its option authMechanism is not one of SCRAM-SHA-256"),
        ("mongodb://h/?w=1", "its option w is not majority: an acknowledged write must be on a majority"),
        ("mongodb://h/?w=0", "its option w is not majority"),
        ("mongodb://h/?journal=false", "its option journal is not true"),
        ("mongodb://h/?j=false", "its option journal is not true"),
        ("mongodb://h/?retryWrites=false", "its option retrywrites is not true"),
        ("mongodb://h/?readPreference=nearest", "its option readpreference is not primary: a secondary may"),
        ("mongodb://h/?wTimeoutMS=5", "use the flag -mongodb.timeout instead"),
        ("mongodb://h/?maxPoolSize=5", "use the flag -mongodb.pool.size instead"),
        ("mongodb://h/?tls=true&tlsInsecure=true", "name the authority of the servers in tlsCAFile"),
        ("mongodb://h/?tlsCAFile=/ca", "tlsCAFile and tlsCertificateKeyFile need tls=true"),
        ("mongodb://h/?tls=true&tlsCAFile=/c%0aa", "its option tlsCAFile is empty or not printable"),
        (
            f"mongodb://h/?{X509}&tlsCertificateKeyFilePassword=%00",
            "its option tlsCertificateKeyFilePassword is empty or not printable",
        ),
        ("mongodb://h/?tlsCertificateKeyFilePassword=x", "needs tlsCertificateKeyFile"),
        ("mongodb://h/?srvMaxHosts=2", "its option srvMaxHosts needs mongodb+srv://"),
        ("mongodb+srv://c.example.net/?srvMaxHosts=x", "its option srvMaxHosts is not a number"),
        ("mongodb+srv://c.example.net:1", "one host, and no port"),
        ("mongodb+srv://a.b.c,d.e.f", "one host, and no port"),
        ("mongodb+srv://localhost", "a host is missing or wrong"),
        ("mongodb://a,b/?directConnection=true", "directConnection needs mongodb:// and one host"),
        ("mongodb+srv://a.b.c/?directConnection=true", "directConnection needs mongodb:// and one host"),
        (
            "mongodb+srv://a.b.c/?srvMaxHosts=2&replicaSet=r",
            "srvMaxHosts, which is for a mongos, and replicaSet",
        ),
        ("mongodb://h/?authMechanism=PLAIN", "its authMechanism needs a user and a password"),
        ("mongodb://CN=d@h/?authMechanism=MONGODB-X509", "MONGODB-X509 needs tlsCertificateKeyFile"),
        (f"mongodb://CN=d:{SECRET}@h/?{X509}", "MONGODB-X509 takes no password"),
        (f"mongodb://h/?{X509}&authSource=admin", "MONGODB-X509 takes no authSource but $external"),
        (f"mongodb://h/?appName={'x' * 129}", "its option appName is longer than 128 bytes"),
        ("mongodb://%2Frun%2Fmongodb", "a host is missing or wrong"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line_without_its_secret(text: str, complaint: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse(text)

    assert complaint in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("-mongodb.address=mongodb://h/?w=1", "flag -mongodb.address: its option w is not majority"),
        ("-mongodb.address=embedded:", "flag -mongodb.address: a private MongoDB cannot be started: start a"),
        (
            "-mongodb.address=mongodb://h/?tls=true&tlsCAFile=/nowhere",
            "flag -mongodb.address: tlsCAFile: /nowhere: No such file",
        ),
        (
            f"-mongodb.address=mongodb://h/?tls=true&tlsCAFile={__file__}",
            f"flag -mongodb.address: tlsCAFile: {__file__}: it holds no certificate",
        ),
        ("-mongodb.collection=", "flag -mongodb.collection: '' is not a name of 1 to 100 bytes"),
        ("-mongodb.collection=a$b", "flag -mongodb.collection: 'a$b' is not a name"),
        ("-mongodb.collection=a.", "flag -mongodb.collection: 'a.' is not a name"),
        ("-mongodb.collection=.a", "flag -mongodb.collection: '.a' is not a name"),
        ("-mongodb.collection=a..b", "flag -mongodb.collection: 'a..b' is not a name"),
        ("-mongodb.collection=system.users", "flag -mongodb.collection: 'system.users' is not a name"),
        ("-mongodb.address.file=/nowhere", "flag -mongodb.address.file: /nowhere: No such file"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(flag: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured("-storage=mongodb", flag)

    assert str(caught.value).startswith(complaint)


def test_the_address_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "address"
    file.write_text(f"mongodb://u:{SECRET}@h\n")
    config = configured("-storage=mongodb", f"-mongodb.address.file={file}")

    assert parse(config[MongoConfig].address).login.password == SECRET
    with pytest.raises(ConfigError, match=r"-mongodb\.address is given as well"):
        configured("-storage=mongodb", f"-mongodb.address.file={file}", "-mongodb.address=mongodb://h")


def test_the_files_of_tls_are_read_at_the_start(tmp_path: Path) -> None:
    Authority(tmp_path / "ca").flags("127.0.0.1")
    node = tmp_path / "ca" / "node"
    both = tmp_path / "both.pem"
    both.write_text("".join(path.read_text() for path in sorted(node.glob("*.pem"))))
    (key,) = node.glob("key.pem")

    configured("-storage=mongodb", f"-mongodb.address=mongodb://h/?tls=true&tlsCertificateKeyFile={both}")
    for wrong in (key, tmp_path):
        address = f"-mongodb.address=mongodb://h/?tls=true&tlsCertificateKeyFile={wrong}"
        with pytest.raises(ConfigError, match=rf"tlsCertificateKeyFile: {wrong}: "):
            configured("-storage=mongodb", address)


def test_without_the_client_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongodb_config, "find_spec", lambda _: None)

    with pytest.raises(
        ConfigError, match=r"flag -storage: mongodb needs .*pip install 'mnemosyned\[mongodb\]'"
    ):
        configured("-storage=mongodb")
    configured("-storage=memory")
