"""Addresses of Redis: read, or refused with one line without any secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from serving import configured

from mnemosyned.config.flags import ConfigError
from mnemosyned.storage.addresses import AddressError, Login
from mnemosyned.storage.redis import config as redis_config
from mnemosyned.storage.redis.address import Address, Files, parse
from mnemosyned.storage.redis.config import RedisConfig

SECRET = "hunter2-of-this-test"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("redis://h", Address(hosts=(("h", 6379),))),
        ("redis://h:7000/3", Address(hosts=(("h", 7000),), database=3)),
        ("redis://h?db=3", Address(hosts=(("h", 6379),), database=3)),
        ("redis://[::1]:7000", Address(hosts=(("::1", 7000),))),
        (f"redis://:{SECRET}@h", Address(hosts=(("h", 6379),), login=Login(password=SECRET))),
        ("redis://u%40:p%2F%3A@h", Address(hosts=(("h", 6379),), login=Login(user="u@", password="p/:"))),
        (
            "rediss://h?cacert=/ca&cert=/c&key=/k",
            Address(hosts=(("h", 6379),), is_tls=True, files=Files(cacert="/ca", cert="/c", key="/k")),
        ),
        (
            f"redis+cluster://u:{SECRET}@a,b:7000/",
            Address(
                hosts=(("a", 6379), ("b", 7000)), login=Login(user="u", password=SECRET), is_cluster=True
            ),
        ),
        (
            "rediss+cluster://a/0?cacert=/ca",
            Address(hosts=(("a", 6379),), is_tls=True, is_cluster=True, files=Files(cacert="/ca")),
        ),
        (
            f"redis+sentinel://u:{SECRET}@a,b:7000/service?db=2&sentinel_password=s",
            Address(
                hosts=(("a", 26379), ("b", 7000)),
                service="service",
                database=2,
                login=Login(user="u", password=SECRET),
                sentinel_login=Login(password="s"),
            ),
        ),
        ("unix:///run/r.sock?db=1", Address(hosts=(), path="/run/r.sock", database=1)),
    ],
)
def test_an_address_says_where_the_server_is(text: str, address: Address) -> None:
    assert parse(text) == address
    assert SECRET not in f"{address}{address!r}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SECRET, "it is not a URL"),
        (f"http://{SECRET}", "its scheme is not one of redis, rediss, redis+sentinel"),
        ("redis+cluster://a,b/1", "a Redis Cluster has none but 0"),
        ("redis+cluster://a?db=2", "a Redis Cluster has none but 0"),
        ("redis+cluster://a?sentinel_password=x", "need redis+sentinel://"),
        ("redis+cluster://", "a host is missing or wrong"),
        ("redis+cluster://a?cacert=/ca", "need rediss://"),
        (f"redis://{SECRET}@h", "a user without a password"),
        (f"redis://u:{SECRET}", "a host is missing or wrong"),
        (f"redis://u:{SECRET}/x@h", "a host is missing or wrong"),
        (f"redis://u:{SECRET}?x@h", "it has a parameter that is not one of db"),
        ("redis://h:0", "a host is missing or wrong"),
        ("redis://h:99999", "a host is missing or wrong"),
        ("redis://a,b", "only redis+sentinel:// and redis+cluster:// take them"),
        ("redis://h/x", "its database is not a number from 0 to 9999"),
        ("redis://h/1?db=1", "it names its database twice"),
        ("redis://h?db=1&db=2", "the parameter db twice"),
        (f"redis://u%0a:{SECRET}@h", "its user or password has a control character"),
        ("rediss://h?cacert=/c%0aa", "cacert, cert or key is not printable"),
        ("redis://h?cacert=/ca", "need rediss://"),
        ("rediss://h?cert=/c", "cert and key belong together"),
        ("redis://h?sentinel_password=x", "need redis+sentinel://"),
        ("redis+sentinel://h", "it lacks the name of the service"),
        ("unix://r.sock", "an absolute path"),
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
        ("-redis.address=redis://a,b", "flag -redis.address: it has several hosts"),
        ("-redis.address=rediss://h?cacert=/nowhere", "flag -redis.address: cacert: /nowhere: No such file"),
        ("-redis.prefix=", "flag -redis.prefix: '' is not a text of 1 to 100 bytes"),
        ("-redis.prefix={a}", "flag -redis.prefix: '{a}' is not a text"),
        ("-redis.wait=many", "flag -redis.wait: 'many' is not a whole number from 0 to 100, nor auto"),
        ("-redis.address.file=/nowhere", "flag -redis.address.file: /nowhere: No such file"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(flag: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured("-storage=redis", flag)

    assert str(caught.value).startswith(complaint)


def test_the_address_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "address"
    file.write_text(f"redis://:{SECRET}@h\n")
    config = configured("-storage=redis", f"-redis.address.file={file}", "-redis.wait=2")

    assert parse(config[RedisConfig].address).login.password == SECRET
    assert config[RedisConfig].wait == 2
    with pytest.raises(ConfigError, match=r"-redis\.address is given as well"):
        configured("-storage=redis", f"-redis.address.file={file}", "-redis.address=redis://h")


def test_the_files_of_tls_are_read_at_the_start(tmp_path: Path) -> None:
    Authority(tmp_path / "ca").flags("127.0.0.1")
    node = tmp_path / "ca" / "node"
    cert, key, guarded = node / "crt.pem", node / "key.pem", tmp_path / "guarded.pem"
    private = load_pem_private_key(key.read_bytes(), None)
    guarded.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET.encode()))
    )

    configured("-storage=redis", f"-redis.address=rediss://h?cert={cert}&key={key}")
    for wrong, reason in (
        (cert, "they do not fit, or the key has a password"),
        (guarded, "they"),
        (tmp_path, ""),
    ):
        with pytest.raises(ConfigError, match=rf"flag -redis\.address: cert, key: {cert}, {wrong}: {reason}"):
            configured("-storage=redis", f"-redis.address=rediss://h?cert={cert}&key={wrong}")


def test_without_the_client_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_config, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"flag -storage: redis needs .*pip install 'mnemosyned\[redis\]'"):
        configured("-storage=redis")
    configured("-storage=memory")
