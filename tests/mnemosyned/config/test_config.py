from __future__ import annotations

import os
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from certificates import Authority
from secrecy import CANARY

from mnemosyned.commands import help_text
from mnemosyned.config.config import Config
from mnemosyned.config.flags import ConfigError, flags_of
from mnemosyned.config.help import actions_in
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.security.config import AuthConfig, TlsConfig
from mnemosyned.sessions.config import CacheConfig, SessionsConfig
from mnemosyned.settings import FLAGS, SECTIONS, parse
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.transport.config import GrpcConfig


def complaint(*argv: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_defaults_are_those_of_the_go_daemon() -> None:
    config = parse([], {})

    assert (config[GrpcConfig].host, config[GrpcConfig].port) == ("127.0.0.1", 8080)
    assert (config[SessionsConfig].ttl_s, config[SessionsConfig].ttc_s) == (24 * 60, 60)
    assert config[PostgresConfig].address == "postgres://postgres:postgres@postgres/postgres?sslmode=disable"
    assert (config[PostgresConfig].schema, config[PostgresConfig].table) == ("mnemosyne", "session")
    assert (
        config[ObserveConfig].log_environment,
        config[ObserveConfig].log_level,
        config[StorageConfig].name,
    ) == ("production", "info", "postgres")
    assert not config[TlsConfig].is_on
    assert config[ClusterConfig].seeds == ()


@pytest.mark.parametrize(
    "argv",
    [
        ["-ttl=1h30m"],
        ["-ttl", "1h30m"],
        ["--ttl=1h30m"],
        ["--ttl", "1h30m"],
        ["-ttl", "5m", "-ttl", "1h30m"],
    ],
)
def test_every_spelling_of_a_flag_is_understood(argv: list[str]) -> None:
    assert parse(argv, {})[SessionsConfig].ttl_s == 5400


@pytest.mark.parametrize(
    ("argv", "is_on"),
    [
        (["-grpc.debug"], True),
        (["--grpc.debug"], True),
        (["-grpc.debug=true"], True),
        (["-grpc.debug=T"], True),
        (["-grpc.debug=1"], True),
        (["-grpc.debug=false"], False),
        (["-grpc.debug", "-grpc.debug=F"], False),
    ],
)
def test_a_boolean_stands_alone_or_has_its_value_attached(argv: list[str], is_on: bool) -> None:  # noqa: FBT001
    assert parse(argv, {})[GrpcConfig].is_debug is is_on


def test_seeds_add_up_over_commas_and_repetition() -> None:
    config = parse(["-cluster.listen=me:1", "-cluster.seeds=a:1, b:2", "-cluster.seeds", "[::1]:3,a:1"], {})

    assert config[ClusterConfig].seeds == ("a:1", "b:2", "[::1]:3")


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('ttl = "1m"\nttc = "2m"\nport = 1\n[cluster]\nseeds = ["file:1"]\n')
    environ = {"MNEMOSYNED_TTC": "3m", "MNEMOSYNED_PORT": "2", "MNEMOSYNED_CLUSTER_SEEDS": "env:1,env:2"}
    listen = "-cluster.listen=me:1"
    config = parse([f"-config={file}", "-port=3", listen], environ)

    assert (config[SessionsConfig].ttl_s, config[SessionsConfig].ttc_s, config[GrpcConfig].port) == (
        60,
        180,
        3,
    )
    assert config[ClusterConfig].seeds == ("env:1", "env:2")
    assert parse(["-cluster.seeds=flag:1", listen], environ)[ClusterConfig].seeds == ("flag:1",)
    assert parse(["-tls=false"], {"MNEMOSYNED_TLS": "true"})[TlsConfig].is_on is False


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "c.toml",
            '"cache.bytes" = "1GiB"\nlog.level = "warn"\n[grpc]\nmax-message = "1MiB"\ndebug = true\n',
        ),
        ("c.yaml", "cache.bytes: 1GiB\nlog:\n  level: warn\ngrpc:\n  max-message: 1MiB\n  debug: true\n"),
        ("c.yml", "{cache: {bytes: 1073741824}, log.level: warn, grpc: {max-message: 1MiB, debug: true}}"),
    ],
)
def test_a_file_may_be_toml_or_yaml_nested_or_dotted(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = parse([], {"MNEMOSYNED_CONFIG": str(tmp_path / name)})

    assert config[CacheConfig].max_bytes == 1024**3
    assert config[ObserveConfig].log_level == "warn"
    assert config[GrpcConfig].max_message_bytes == 1024**2
    assert config[GrpcConfig].is_debug is True


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")

    assert parse([f"-config={tmp_path / 'c.yaml'}"], {}) == parse([], {})


def test_the_port_that_kubernetes_sets_for_a_service_is_ignored() -> None:
    assert parse([], {"MNEMOSYNED_PORT": "tcp://10.0.0.1:8080"})[GrpcConfig].port == 8080


def test_the_touch_interval_follows_the_ttl() -> None:
    assert parse(["-ttl=24m"], {})[SessionsConfig].touch_interval_s == 10
    assert parse(["-ttl=10s"], {})[SessionsConfig].touch_interval_s == 1
    assert parse(["-ttl=24m", "-touch.interval=30s"], {})[SessionsConfig].touch_interval_s == 30


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("-ttl=1d", "flag -ttl: '1d' is not a duration"),
        ("-ttl=900000h", "flag -ttl: '900000h' is more than 100 years"),
        ("-drain.timeout=1" + "0" * 400 + "h", "is more than 100 years"),
        ("-ttl=0", "flag -ttl: '0' is less than 1s"),
        ("-ttl=-1m", "flag -ttl: '-1m' is less than 1s"),
        ("-ttc=10ms", "flag -ttc"),
        ("-port=x", "flag -port: 'x' is not a whole number from 0 to 65534"),
        ("-port=65535", "flag -port"),
        ("-host=", "flag -host"),
        ("-host=a b", "flag -host"),
        ("-host=unix:relative", "flag -host: 'unix:relative' is not unix: and an absolute path"),
        ("-host=unix:/a b", "flag -host"),
        ("-grpc.engine=fast", "flag -grpc.engine: 'fast' is not one of h2, grpcio"),
        ("-grpc.max-message=4MB", "flag -grpc.max-message: '4MB' is not a number of bytes"),
        ("-grpc.max-message=1GiB", "flag -grpc.max-message"),
        ("-grpc.debug=maybe", "flag -grpc.debug: 'maybe' is not true or false"),
        ("-cache.size=0", "flag -cache.size"),
        ("-cache.bytes=1", "flag -cache.bytes"),
        ("-cache.ttl=-1s", "flag -cache.ttl"),
        ("-touch.interval=10m", "flag -touch.interval: more than a quarter of -ttl"),
        ("-storage=etcd", "flag -storage: 'etcd' is not one of postgres, redis, mongodb, memory"),
        ("-postgres.table=", "flag -postgres.table"),
        ("-postgres.schema=" + "x" * 64, "flag -postgres.schema"),
        ("-postgres.pool.size=1", "flag -postgres.pool.size"),
        ("-cluster.listen=nowhere", "flag -cluster.listen: 'nowhere' is not an address"),
        ("-cluster.seeds=a:1,b", "flag -cluster.seeds: 'b' is not an address"),
        ("-cluster.seeds=a:70000", "flag -cluster.seeds"),
        ("-cluster.seeds=a:1", "flag -cluster.seeds names others, who need -cluster.listen"),
        ("-cluster.label=a b", "flag -cluster.label: 'a b' is not a label"),
        ("-cluster.secret.file=/nowhere", "flag -cluster.secret.file: /nowhere: No such file"),
        ("-log.environment=staging", "flag -log.environment"),
        ("-log.level=loud", "flag -log.level"),
        ("-tls", "flag -tls needs -tls.crt"),
        ("-tls.crt=x", "flag -tls.crt is given, and -tls is not"),
        ("-tls.ca=x", "flag -tls.ca is given, and -tls is not"),
        ("-tls.client-auth=maybe", "flag -tls.client-auth: 'maybe' is not one of none, optional, require"),
        ("-tls.client-auth=require", "flag -tls.client-auth: require needs -tls.ca"),
        ("-tls.peer-names=a b", "flag -tls.peer-names: 'a b' is not a host name"),
        ("-tls.peer-names=a.*", "flag -tls.peer-names: 'a.*' is not a host name"),
        ("-tls.peer-names=*.nodes", "nodes show no certificate while -tls.client-auth is none"),
        ("-stor=memory", "flag -stor is not known; did you mean -storage?"),
        ("--st=memory", "flag -st is not known"),
        ("-t", "flag -t is not known"),
        ("-ttl", "flag -ttl needs a value"),
        ("stray", "argument 1 is not a flag"),
        ("-", "argument 1 is not a flag"),
        ("--", "argument 1 is not a flag"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(argument: str, named: str) -> None:
    assert named in complaint(argument)


def test_a_value_after_a_boolean_is_a_stray_argument_as_in_go() -> None:
    assert "argument 2 is not a flag" in complaint("-tls", "false")


def test_a_wrong_variable_is_named() -> None:
    text = complaint(MNEMOSYNED_TTL="soon")

    assert "MNEMOSYNED_TTL" in text
    assert "'soon'" in text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("ttl: 2026-99-99", "flag -ttl from the config file: '2026-99-99'"),
        ("ttl: soon", "flag -ttl from the config file: 'soon'"),
        ("tl: 5m", "config file: tl is not a flag; did you mean -ttl?"),
        ("ttl: [5m", "is not valid YAML"),
        ("- ttl", "it is not a table of flags"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "c.yaml").write_text(content)

    assert named in complaint(f"-config={tmp_path / 'c.yaml'}")


def test_a_missing_or_binary_or_broken_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in complaint(f"-config={tmp_path / 'absent.yaml'}")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in complaint(f"-config={tmp_path / 'c.toml'}")


def test_memory_storage_is_for_a_single_node() -> None:
    assert "-storage" in complaint("-storage=memory", "-cluster.seeds=a:1")
    own = ["-storage=memory", "-cluster.listen=a:1", "-cluster.seeds=a:1"]
    assert parse(own, {})[ClusterConfig].seeds == ("a:1",)


def test_tls_needs_files_that_can_be_read(tmp_path: Path) -> None:
    certificate, key = tmp_path / "crt", tmp_path / "key"
    certificate.write_text("")
    missing = complaint("-tls", f"-tls.crt={certificate}", f"-tls.key={key}")
    key.write_text("")

    assert "flag -tls.key" in missing
    assert "No such file" in missing
    given = ["-tls", f"-tls.crt={certificate}", f"-tls.key={key}"]
    assert parse(given, {})[TlsConfig].is_on
    assert "flag -tls.ca: /nowhere: No such file" in complaint(*given, "-tls.ca=/nowhere")
    mutual = [*given, f"-tls.ca={certificate}", "-tls.client-auth=optional", "-tls.peer-names=a.b,*.c"]
    assert parse(mutual, {})[TlsConfig].peer_names == ("a.b", "*.c")
    assert "knows none and require only" in complaint(*mutual, "-grpc.engine=grpcio")


@pytest.mark.parametrize(
    "argv",
    [
        ["-postgres.address=mysql://u:hunter2@h/d"],
        ["postgres://u:hunter2@h/d"],
        ["-postgres.adress=postgres://u:hunter2@h/d"],
        ["-postgres.address:postgres://u:hunter2@h/d"],
        ["-postgres.address.file=postgres://u:hunter2@h/d"],
        ["-host=postgres://u:hunter2@h/d"],
        ["-cluster.secret=with-a-space-in", "hunter2"],
        ["-cluster.secret hunter2"],
        ["-cluster.secret.file=hunter2-hunter2-hunter2"],
        ["-auth.keys=mnk_hunter2"],
        ["-tls", "-tls.crt=/dev/null", "-tls.key=-----BEGIN PRIVATE KEY-----\nhunter2"],
    ],
)
def test_a_password_is_never_shown(argv: list[str]) -> None:
    assert "hunter2" not in complaint(*argv)
    assert "hunter2" not in complaint(MNEMOSYNED_POSTGRES_ADDRESS="mysql://u:hunter2@h/d")
    assert "hunter2" not in repr(parse(["-postgres.address=postgres://u:hunter2@h/d"], {}))


def test_a_password_in_a_broken_file_is_never_shown(tmp_path: Path) -> None:
    for name in ("c.toml", "c.yaml"):
        (tmp_path / name).write_text('postgres.address: ["hunter2"\n')
        assert "hunter2" not in complaint(f"-config={tmp_path / name}")


@pytest.mark.parametrize("argument", ["-version", "--version"])
def test_version_is_asked_for(argument: str) -> None:
    assert actions_in(["-ttl=5m", argument]) == {"version"}


@pytest.mark.parametrize("argument", ["-h", "-help", "--help"])
def test_help_names_every_flag_with_its_variable_in_the_group_of_its_section(argument: str) -> None:
    assert actions_in([argument]) == {"help"}
    out = help_text()

    for section in SECTIONS:
        group = out.partition(f"\n{section.TITLE}\n  example: {section.EXAMPLE}\n")[2]
        for flag in flags_of(section).values():
            assert f"  -{flag.name}\n" in group
            assert flag.variable in group


def test_every_example_of_help_is_a_valid_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("node.pem", "node.key", "ca.pem", "callers.txt", "token.key", "secret"):
        (tmp_path / name).write_text("x" * 32)
    for section in SECTIONS:
        program, *argv = shlex.split(section.EXAMPLE)
        if "-config=/etc/mnemosyned.toml" in argv:
            argv.remove("-config=/etc/mnemosyned.toml")

        assert program == "mnemosyned"
        assert isinstance(parse(argv, {}), Config)


def test_every_flag_has_a_name_of_its_own_and_a_valid_default() -> None:
    assert isinstance(parse([], {}), Config)
    assert len(FLAGS) == sum(len(flags_of(section)) for section in SECTIONS)


def test_no_secret_has_a_place_in_what_a_section_shows_of_itself() -> None:
    for section in SECTIONS:
        for field in fields(section):
            flag = flags_of(section).get(field.name)
            assert field.repr is (flag is not None and not flag.is_secret)


def test_secrets_come_from_the_flag_and_the_file_together(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("the second of the two\n".replace(" ", "-"))
    config = parse(["-cluster.secret=the-first-of-the-two", f"-cluster.secret.file={file}"], {})

    assert config[ClusterConfig].secret == ("the-first-of-the-two", "the-second-of-the-two")
    assert "the-first" not in repr(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is empty"),
        ("hunter2", "shorter than 16"),
        ("a" * 16 + "\n" + "b" * 16 + "\n" + "c" * 16, "more than 2"),
    ],
    ids=["empty", "short", "three"],
)
def test_a_wrong_secret_file_is_named_and_never_shown(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    text = complaint(f"-cluster.secret.file={file}")

    assert words in text
    assert "hunter2" not in text


def test_a_short_secret_is_refused_and_not_shown() -> None:
    assert "hunter2" not in complaint("-cluster.secret=hunter2")


def test_the_address_of_the_storage_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "address"
    file.write_text("postgres://u:hunter2@h/d\n")
    config = parse([], {"MNEMOSYNED_POSTGRES_ADDRESS_FILE": str(file)})

    assert config[PostgresConfig].address == "postgres://u:hunter2@h/d"
    assert "hunter2" not in repr(config)
    both = complaint(f"-postgres.address.file={file}", "-postgres.address=postgres://u:hunter2@h/d")
    assert "-postgres.address is given as well" in both
    assert "hunter2" not in both


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "it is empty"), ("mysql://u:hunter2@h", "does not start with"), ("hunter2", "does not start with")],
)
def test_a_wrong_file_with_an_address_is_named_and_never_shown(
    content: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(content)
    text = complaint(f"-postgres.address.file={file}")

    assert words in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ("", "it is empty"),
        ("2short", "a key is shorter than 32 characters"),
        (f"{'a' * 32}\n{'b' * 32}\n{'c' * 32}", "more than 2 keys"),
    ],
)
def test_a_key_file_of_no_use_is_refused_without_showing_it(
    tmp_path: Path, keys: str, complaint: str
) -> None:
    path = tmp_path / "token.key"
    path.write_text(keys)
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse(["-token.protection=hmac", f"-token.key.file={path}"], {})

    assert not keys or keys.split(maxsplit=1)[0] not in str(caught.value)


def test_the_keys_of_tokens_come_from_their_file_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    path.write_text(f"{'b' * 32}\n{'a' * 32}\n")

    assert parse([f"-token.key.file={path}"], {})[AuthConfig].token_keys == ("b" * 32, "a" * 32)


def written(tmp_path: Path, content: str, mode: int, name: str = "c.yaml") -> str:
    path = tmp_path / name
    path.write_text(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("flag", ["cluster.secret.file", "token.key.file", "postgres.address.file"])
def test_a_secret_that_others_may_write_is_refused_with_the_flag_and_the_remedy(
    tmp_path: Path, flag: str
) -> None:
    path = written(tmp_path, "x" * 32, 0o660)

    assert complaint(f"-{flag}={path}") == (
        f"flag -{flag}: {path}: other users may write it; chmod go-w {path}"
    )


@pytest.mark.parametrize("flag", ["tls.crt", "tls.key", "tls.ca"])
def test_a_tls_file_that_others_may_write_is_refused(tmp_path: Path, flag: str) -> None:
    good, bad = written(tmp_path, "x", 0o600, "good"), written(tmp_path, "x", 0o606, "bad")
    paths = {"tls.crt": good, "tls.key": good, "tls.ca": good} | {flag: bad}
    text = complaint("-tls", *(f"-{name}={path}" for name, path in paths.items()))

    assert text.startswith(f"flag -{flag}: {bad}: other users may write it")


@pytest.mark.parametrize(
    ("content", "has_secret"),
    [
        ("cluster.secret: hunter2-hunter2-hunter2", True),
        ("cluster: {secret: [hunter2-hunter2-hunter2]}", True),
        ("postgres.address: postgres://u:hunter2@h/d", True),
        ("postgres.address: postgres://h/d?user=u&password=hunter2", True),
        ("postgres.address: postgres://u@h/d", False),
        ("postgres.address: 'embedded:'", False),
        ("ttl: 5m", False),
        ("", False),
    ],
)
def test_a_config_file_is_a_file_with_a_secret_if_it_has_one(
    tmp_path: Path, content: str, *, has_secret: bool
) -> None:
    path = written(tmp_path, content, 0o644)

    assert parse([f"-config={path}"], {}).secret_files() == ({"config": path} if has_secret else {})
    assert "other users may write it" in complaint(MNEMOSYNED_CONFIG=written(tmp_path, content, 0o646))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_third_users_config_file_is_refused_if_it_has_a_secret(tmp_path: Path) -> None:
    plain, secret = written(tmp_path, "ttl: 5m", 0o644), written(tmp_path, "cluster.secret: abc", 0o600, "s")
    for path in (plain, secret):
        os.chown(path, 65534, 65534)

    assert parse([f"-config={plain}"], {})[SessionsConfig].ttl_s == 300
    assert "which has a secret: it belongs to another user" in complaint(f"-config={secret}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbfttl: 5m", "byte order mark"),
        (b"ttl: 5m\0", "line 1 has a NUL byte"),
        ("ttl: 5m".encode("utf-16"), "it is UTF-16"),
        (b"a: &a {b: *a}", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"ttl: 5m\nport: [1", "not valid YAML, in line 2"),
        (b"port: 8080\nport: 9090", "port is given twice"),
        (b"cache.size: 1\ncache: {size: 2}", "cache.size is given twice"),
        (b"port: [8080, 9090]", "port takes one value, and not a list"),
        (b"cluster.seeds: [[a]]", "cluster.seeds is a list of more than values"),
        (b"storage: !!python/object:os.system x", "storage has a type of its own"),
        (b"cluster.secret: !secret hunter2", "cluster.secret has a type of its own"),
        (b"? {a: b}\n: c", "a key in line 1 is not a name"),
        *(
            (b"port: " + it, "port: YAML reads numbers")
            for it in (b"0123", b"0o17", b"0x7b", b"1_0", b"08", b"1:30")
        ),
        (b"#" * 300_000, "it is larger than 262144 bytes"),
    ],
)
def test_a_damaged_config_file_is_named_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    text = complaint(f"-config={path}")

    assert text.startswith(f"config file {path}: ")
    assert words in text


def test_a_toml_file_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    for content, words in (
        ("port = 1\nport = 2\n", "a key is given twice"),
        ('"cache.size" = 1\n[cache]\nsize = 2', "cache.size is given twice"),
        ("port = [1, 2]", "port takes one value"),
    ):
        (tmp_path / "c.toml").write_text(content)
        assert words in complaint(f"-config={tmp_path / 'c.toml'}")


def test_values_of_yaml_mean_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: '0123'\ntls: no\ncluster.label: 2026-11-26\n")
    config = parse([f"-config={tmp_path / 'c.yaml'}"], {})

    assert config[GrpcConfig].port == 123
    assert not config[TlsConfig].is_on
    assert config[ClusterConfig].label == "2026-11-26"


def test_a_config_file_with_windows_lines_is_valid(tmp_path: Path) -> None:
    for name, content in (("c.yaml", b"ttl: 5m\r\n"), ("c.toml", b'ttl = "5m"\r\n')):
        (tmp_path / name).write_bytes(content)
        assert parse([f"-config={tmp_path / name}"], {})[SessionsConfig].ttl_s == 300


def test_what_is_no_file_is_no_config_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    assert "it is a FIFO" in complaint(f"-config={tmp_path / 'fifo'}")
    assert "it is a directory" in complaint(f"-config={tmp_path}")
    assert "it is a device" in complaint("-config=/dev/zero")


def test_with_api_keys_nodes_prove_who_they_are(tmp_path: Path) -> None:
    given = ["-auth.keys=callers", "-cluster.listen=a:1"]
    ca = written(tmp_path, "x", 0o600)
    mutual = ["-tls", f"-tls.crt={ca}", f"-tls.key={ca}", f"-tls.ca={ca}", "-tls.client-auth=optional"]

    for alone in (given, [*given, *mutual], [*given, "-storage=memory"]):
        assert complaint(*alone) == (
            "flag -cluster.listen: with -auth.keys, nodes need -cluster.secret.file or -tls.peer-names"
        )
    assert parse([*given, "-cluster.secret=hunter2-and-more-of-it"], {})
    assert parse([*given, *mutual, "-tls.peer-names=*.nodes"], {})
    assert parse(["-auth.keys=callers"], {})
    assert parse(["-cluster.listen=a:1"], {})


@pytest.mark.parametrize(
    ("bind", "flags", "named"),
    [
        ("127.0.0.1:8080", [], "127.0.0.1:8080 is the gRPC port"),
        ("0.0.0.0:8080", [], "0.0.0.0:8080 is the gRPC port"),
        ("127.0.0.1:8080", ["-host=0.0.0.0"], "is the gRPC port"),
        ("[::1]:8080", ["-host=::"], "is the gRPC port"),
        ("127.0.0.1:8081", [], "is the admin port"),
        ("127.0.0.1:9001", ["-port=9000"], "is the admin port"),
        ("nowhere", [], "'nowhere' is not an address"),
        ("unix:/run/s", [], "is not an address"),
    ],
)
def test_a_peers_port_that_is_taken_by_this_node_is_named(bind: str, flags: list[str], named: str) -> None:
    text = complaint(f"-cluster.bind={bind}", "-cluster.listen=a:1", *flags)

    assert text.startswith("flag -cluster.bind: ")
    assert named in text


@pytest.mark.parametrize("bind", ["127.0.0.1:8082", "10.0.0.1:8080", "[::1]:8080", "127.0.0.1:8079"])
def test_a_peers_port_of_its_own_is_valid(bind: str) -> None:
    assert parse([f"-cluster.bind={bind}", "-cluster.listen=a:1"], {})[ClusterConfig].bind == bind


def test_a_peers_port_needs_an_address_for_peers() -> None:
    assert "-cluster.listen is not" in complaint("-cluster.bind=127.0.0.1:9")


def test_the_members_are_bounded() -> None:
    assert parse([], {})[ClusterConfig].max_members == 1000
    for count in ("1", "65537", "-5", "many"):
        assert "from 2 to 65536" in complaint(f"-cluster.max-members={count}")


@pytest.mark.parametrize("parameter", ["sslkey", "passfile"])
def test_a_file_in_the_address_of_the_database_is_a_file_with_a_secret(
    tmp_path: Path, parameter: str
) -> None:
    files = Authority(tmp_path).files("client")
    content = Path(files.private_key).read_text() if parameter == "sslkey" else "h:5432:d:u:hunter2"
    path = written(tmp_path, content, 0o600)
    certificate = f"&sslcert={files.certificate}" if parameter == "sslkey" else ""
    address = f"-postgres.address=postgres://u:hunter2@h/d?sslmode=require&{parameter}={path}{certificate}"

    assert parse([address], {}).secret_files() == {f"postgres.address ({parameter})": path}
    Path(path).chmod(0o602)
    text = complaint(address)
    assert text.startswith(f"flag -postgres.address: its {parameter}, {path}: other users may write it")
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("f.yaml", "port: 1\n--port: 2", "port is given twice"),
        ("f.yaml", "port:", "port has no value; leave it out, or write an empty text as two quotes"),
        ("f.yaml", "cluster.seeds: [a:1, ~]", "cluster.seeds has no value"),
        ("f.yaml", "~: 2", "a key is not the name of a flag"),
        ("f.yaml", "config: /other", "config names this file, and cannot be given in it"),
        ("f.toml", '"" = "hunter2"', "a key is not the name of a flag"),
        ("f.toml", '"hunter2 x" = 1', "hunter2 is not the name of a flag"),
        ("f.toml", "port = 1\nport = 2", "a key is given twice"),
        ("f.toml", 'cache.ttl = "1s"\n[cache]\nttl = "2s"', "a key is given twice, in line 2"),
    ],
)
def test_what_a_file_cannot_mean_is_refused_with_its_name(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    path.chmod(0o600)

    with pytest.raises(ConfigError) as caught:
        parse([f"-config={path}"], {})
    assert str(caught.value).startswith(f"config file {path}: {complaint}")


def test_a_word_that_yaml_takes_for_a_boolean_is_text_where_text_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("host: no\ngrpc.debug: yes\ncache:\n  # size: 10\n")

    config = parse([f"-config={path}"], {})
    assert (config[GrpcConfig].host, config[GrpcConfig].is_debug) == ("no", True)


@pytest.mark.parametrize("value", ["0o17", "0x50", "8_080", "1:30", "9" * 5000])
def test_a_variable_that_is_no_decimal_number_is_refused_in_a_short_line(value: str) -> None:
    with pytest.raises(ConfigError, match="variable MNEMOSYNED_PORT: '") as caught:
        parse([], {"MNEMOSYNED_PORT": value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("flag", ["HOST", "CLUSTER_SECRET", "TLS_CRT", "POSTGRES_TABLE", "LOG_LEVEL"])
def test_bytes_that_are_no_text_are_refused_in_one_line(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"variable MNEMOSYNED_{flag}: it is not UTF-8$"):
        parse([], {f"MNEMOSYNED_{flag}": b"caf\xe9".decode(errors="surrogateescape")})


@pytest.mark.parametrize("name", ["a" * 70, "a..b", "a\x1b", "[::1"])
def test_what_no_resolver_takes_is_no_host(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a host name or address"):
        parse([f"-host={name}"], {})


@pytest.mark.parametrize("text", ["http://[::1", "http://", "ftp://x:1", "a b:1", "http://x:99999999", "x:0"])
def test_what_is_no_endpoint_of_traces_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"flag -tracing.agent.address: it is not host:port or a URL"):
        parse([f"-tracing.agent.address={text}"], {})


def test_what_the_log_shows_of_flags_has_no_secret(tmp_path: Path) -> None:
    address = tmp_path / "address"
    query = f"sslmode=disable&sslpassword={CANARY}"
    address.write_text(f"postgres://ada:{CANARY}@db.example:7432,[::1]/sessions?{query}")
    address.chmod(0o600)
    flags = [
        f"-postgres.address.file={address}",
        f"-cluster.secret={CANARY}-long-enough-for-a-secret",
        f"-tracing.agent.address=http://user:{CANARY}@127.0.0.1:1/x?key={CANARY}",
    ]
    config = parse(flags, {})
    shown = config.shown(with_defaults=True)

    assert CANARY not in str(shown)
    assert shown["postgres.address"] == "db.example:7432, [::1]:5432, database sessions, user ada"
    assert shown["cluster.secret"] == "[redacted]"
    assert shown["tracing.agent.address"] == "http://[redacted]@127.0.0.1:1/x?[redacted]"
    assert shown["ttl"] == "24m"
