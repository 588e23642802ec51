"""Flags, environment and file: parsed once, here, into a Config.

ConfigArgParse decides which source wins. Its input is normalised before it sees it, because Go's
spelling of flags is not argparse's: one dash or two, no abbreviations, booleans without a value.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Final, NoReturn

import configargparse
import yaml

from mnemosyned import __version__
from mnemosyned.duration import format_duration, parse_duration

_ENV_PREFIX: Final = "MNEMOSYNED_"
_LEVELS: Final = ("debug", "info", "warn", "error", "dpanic", "panic", "fatal")
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_BYTES_BY_UNIT: Final = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_MAX_IDENTIFIER_BYTES: Final = 63
_MAX_TOUCH_INTERVAL_S: Final = 10.0
# What Kubernetes puts into MNEMOSYNED_PORT when there is a Service of our name.
_SERVICE_LINK: Final = re.compile(r"(tcp|udp|sctp)://")


class ConfigError(Exception):
    """A wrong flag, variable or file; the text is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the daemon runs with."""

    host: str
    port: int  # the operator's port is the next one; 0 means any free ports
    grpc_debug: bool
    grpc_engine: str
    grpc_max_message_bytes: int
    drain_timeout_s: float
    cluster_listen: str
    cluster_seeds: tuple[str, ...]
    ttl_s: float
    ttc_s: float
    touch_interval_s: float
    cache_size: int
    cache_bytes: int
    cache_ttl_s: float
    log_environment: str
    log_level: str
    storage: str
    postgres_address: str = field(repr=False)
    postgres_table: str
    postgres_schema: str
    postgres_pool_size: int
    postgres_connect_timeout_s: float
    postgres_statement_timeout_s: float
    postgres_bin: str
    tls: bool
    tls_crt: str
    tls_key: str
    tracing_agent_address: str
    check_config: bool


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, its default as a user would write it, how it is read, what it means."""

    name: str
    default: str
    parse: Callable[[str], Any]  # raises ValueError with what is wrong
    meaning: str
    field: str  # of Config

    @property
    def variable(self) -> str:
        """The environment variable."""
        return _ENV_PREFIX + re.sub(r"[.-]", "_", self.name).upper()

    @property
    def is_boolean(self) -> bool:
        """Whether it may stand without a value."""
        return self.parse is _boolean


def _boolean(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{text!r} is not true or false")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _duration(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < low:
            raise ValueError(f"{text!r} is less than {format_duration(low)}")
        return seconds

    return parse


def _size(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+)(KiB|MiB|GiB|)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not a number of bytes such as 4194304, 4MiB or 1GiB")
        size_bytes = int(match[1]) * _BYTES_BY_UNIT[match[2]]
        if not low <= size_bytes <= high:
            raise ValueError(f"{text!r} is not between {low} and {high} bytes")
        return size_bytes

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _identifier(text: str) -> str:
    if not text or "\0" in text or len(text.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"{text!r} is not a name of 1 to {_MAX_IDENTIFIER_BYTES} bytes")
    return text


def _host(text: str) -> str:
    if not text or any(char.isspace() or char in "[]/" for char in text):
        raise ValueError(f"{text!r} is not a host name or address")
    return text


def _node(text: str) -> str:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(\d{1,5})", text, re.ASCII)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ValueError(f"{text!r} is not an address of the form host:port")
    return text


def _node_or_nothing(text: str) -> str:
    return _node(text) if text else ""


def _nodes(text: str) -> tuple[str, ...]:
    stripped = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(_node(part) for part in stripped if part))


def _postgres_address(text: str) -> str:
    if not text.startswith(("postgres://", "postgresql://", "embedded:")):
        raise ValueError("it does not start with postgres://, postgresql:// or embedded:")
    return text


_ANY_SIZE: Final = 2**50
# In the order of the documentation.
FLAGS: Final = (
    Flag("host", "127.0.0.1", _host, "host to listen on", "host"),
    Flag(
        "port",
        "8080",
        _integer(0, 65534),
        "gRPC port; the operator's HTTP port is the next one; 0: any free ports",
        "port",
    ),
    Flag("grpc.engine", "h2corn", _one_of("h2corn", "grpcio"), "h2corn (fast) or grpcio", "grpc_engine"),
    Flag(
        "grpc.max-message",
        "4MiB",
        _size(1024, 64 * 1024**2),
        "largest request accepted, in bytes or with KiB, MiB",
        "grpc_max_message_bytes",
    ),
    Flag("grpc.debug", "false", _boolean, "very verbose gRPC logging", "grpc_debug"),
    Flag(
        "drain.timeout",
        "10s",
        _duration(0),
        "how long calls in flight may go on after SIGTERM",
        "drain_timeout_s",
    ),
    Flag("ttl", "24m", _duration(1), "how long a session lives after its last Get", "ttl_s"),
    Flag("ttc", "1m", _duration(1), "time to clear: how often expired sessions are removed", "ttc_s"),
    Flag(
        "touch.interval",
        "0",
        _duration(0),
        "how late an extended expiry may be stored; 0: a tenth of -ttl, at most 10s",
        "touch_interval_s",
    ),
    Flag("cache.size", "100000", _integer(1, 10**9), "sessions in the cache", "cache_size"),
    Flag(
        "cache.bytes",
        "256MiB",
        _size(1024**2, _ANY_SIZE),
        "memory of the cache, in bytes or with KiB, MiB, GiB",
        "cache_bytes",
    ),
    Flag(
        "cache.ttl",
        "5s",
        _duration(0),
        "how long a cached session is served before it is read again; 0: no caching",
        "cache_ttl_s",
    ),
    Flag(
        "storage",
        "postgres",
        _one_of("postgres", "memory"),
        "storage engine: postgres, or memory, which forgets everything at exit",
        "storage",
    ),
    Flag(
        "postgres.address",
        "postgres://postgres:postgres@postgres/postgres?sslmode=disable",
        _postgres_address,
        "postgres:// URL; or embedded: for a private server, embedded:///dir with its data there",
        "postgres_address",
    ),
    Flag("postgres.schema", "mnemosyne", _identifier, "schema of the table", "postgres_schema"),
    Flag("postgres.table", "session", _identifier, "table of the sessions", "postgres_table"),
    Flag("postgres.pool.size", "16", _integer(2, 1000), "most connections", "postgres_pool_size"),
    Flag(
        "postgres.connect.timeout",
        "2s",
        _duration(0.001),
        "how long a connection may take to be made",
        "postgres_connect_timeout_s",
    ),
    Flag(
        "postgres.statement.timeout",
        "3s",
        _duration(0.01),
        "how long a statement may take, and a call wait for a connection",
        "postgres_statement_timeout_s",
    ),
    Flag(
        "postgres.bin",
        "",
        str,
        "directory with initdb and postgres for an embedded server; empty: found by itself",
        "postgres_bin",
    ),
    Flag(
        "cluster.listen",
        "",
        _node_or_nothing,
        "this node's address as its peers dial it, host:port; also its name",
        "cluster_listen",
    ),
    Flag(
        "cluster.seeds",
        "",
        _nodes,
        "addresses of other nodes, comma-separated; may be repeated",
        "cluster_seeds",
    ),
    Flag(
        "log.environment",
        "production",
        _one_of("production", "development", "stackdriver"),
        "form of the log: production (JSON), development or stackdriver",
        "log_environment",
    ),
    Flag("log.level", "info", _one_of(*_LEVELS), f"least level logged: {', '.join(_LEVELS)}", "log_level"),
    Flag("tls", "false", _boolean, "serve gRPC over TLS", "tls"),
    Flag("tls.crt", "", str, "PEM file of the certificate chain", "tls_crt"),
    Flag("tls.key", "", str, "PEM file of the private key", "tls_key"),
    Flag(
        "tracing.agent.address",
        "",
        str,
        "OTLP endpoint for traces, host:port or URL; needs the extra otel",
        "tracing_agent_address",
    ),
    Flag("check-config", "false", _boolean, "check flags, environment and file, and exit", "check_config"),
)
_FLAG_BY_NAME: Final = {flag.name: flag for flag in FLAGS}
_ACTIONS: Final = {
    "config": "file with flags, TOML if it ends so, else YAML; nested or dotted keys",
    "help": "show this text",
    "version": "show the version",
}
assert {flag.field for flag in FLAGS} == {one.name for one in fields(Config)}


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the configuration; `-help` and `-version` print and raise SystemExit(0).

    The command line wins over the environment, that over the file, that over the default.

    Raises:
        ConfigError: anything wrong in any of them.
    """
    arguments = list(_normalised(argv))
    names = {argument.partition("=")[0] for argument in arguments}
    if "--help" in names or "--version" in names:
        sys.stdout.write(_help() if "--help" in names else f"mnemosyned {__version__}\n")
        raise SystemExit(0)
    parser = _Parser(add_help=False, allow_abbrev=False, config_file_parser_class=_FileParser)
    parser.add_argument("--config", is_config_file_arg=True, env_var=_ENV_PREFIX + "CONFIG")
    for flag in FLAGS:
        parser.add_argument("--" + flag.name, env_var=flag.variable, action="append", dest=flag.name)
    found = parser.parse_args(arguments, env_vars=dict(_own_variables(environ)))
    texts = {name: values for name, values in vars(found).items() if name != "config" and values}
    sources = _sources(arguments, environ)
    values = {flag.field: _value(flag, texts.get(flag.name), sources) for flag in FLAGS}
    return _checked(values)


def flag_table() -> str:
    """Return the flags as a Markdown table."""
    rows = ["| flag | default | environment | meaning |", "|---|---|---|---|"]
    for flag in FLAGS:
        default = f"`{flag.default}`" if flag.default else ""
        rows.append(f"| `-{flag.name}` | {default} | `{flag.variable}` | {flag.meaning} |")
    rows.append(f"| `-config` | | `{_ENV_PREFIX}CONFIG` | {_ACTIONS['config']} |")
    rows += [f"| `-{name}` | | | {_ACTIONS[name]} |" for name in ("help", "version")]
    return "\n".join(rows) + "\n"


def _help() -> str:
    lines = ["usage: mnemosyned [flags]", "", "A flag takes one dash or two: -ttl 24m, --ttl=24m.", ""]
    for flag in FLAGS:
        lines.append(f"  -{flag.name}")
        default = f" (default {flag.default})" if flag.default else ""
        lines.append(f"        {flag.meaning}{default} [{flag.variable}]")
    for name, meaning in _ACTIONS.items():
        lines += [f"  -{name}", f"        {meaning}"]
    return "\n".join(lines) + "\n"


def _normalised(argv: Sequence[str]) -> Iterator[str]:
    """Yield every flag as `--name=value`."""
    rest = iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            # A stray address would show its password.
            shown = "an argument" if "://" in argument else repr(argument)
            raise ConfigError(f"{shown} is not a flag; booleans take their value as -flag=false")
        name, value = ("help" if match[1] == "h" else match[1]), match[2]
        if name not in _FLAG_BY_NAME and name not in _ACTIONS:
            raise ConfigError(f"flag -{name} is not known{_suggestion(name)}")
        if value is None and name not in {"help", "version"}:
            flag = _FLAG_BY_NAME.get(name)
            value = "true" if flag is not None and flag.is_boolean else next(rest, None)
            if value is None:
                raise ConfigError(f"flag -{name} needs a value")
        yield f"--{name}" if value is None else f"--{name}={value}"


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*_FLAG_BY_NAME, *_ACTIONS], n=1)
    return f"; did you mean -{close[0]}?" if close else ""


def _own_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in (*(flag.variable for flag in FLAGS), _ENV_PREFIX + "CONFIG"):
        value = environ.get(name)
        if value and not (name == _ENV_PREFIX + "PORT" and _SERVICE_LINK.match(value)):
            yield name, value


def _sources(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Say where each flag's value comes from, for complaints."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    variables = dict(_own_variables(environ))
    return {
        flag.name: f"flag -{flag.name}"
        if flag.name in given
        else f"flag -{flag.name} from the environment variable {flag.variable}"
        if flag.variable in variables
        else f"flag -{flag.name} from the config file"
        for flag in FLAGS
    }


def _value(flag: Flag, texts: list[str] | None, sources: Mapping[str, str]) -> Any:  # noqa: ANN401  # any field's
    text = flag.default
    if texts:
        text = ",".join(texts) if flag.parse is _nodes else texts[-1]
    try:
        return flag.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{sources[flag.name]}: {exc}") from None


def _checked(values: dict[str, Any]) -> Config:
    """Check what concerns several flags."""
    if not values["touch_interval_s"]:
        values["touch_interval_s"] = min(values["ttl_s"] / 10, _MAX_TOUCH_INTERVAL_S)
    config = Config(**values)
    if config.touch_interval_s > config.ttl_s / 4:
        raise ConfigError("flag -touch.interval: more than a quarter of -ttl")
    others = [seed for seed in config.cluster_seeds if seed != config.cluster_listen]
    if config.storage == "memory" and others:
        raise ConfigError("flag -storage: memory is for a single node, and -cluster.seeds names others")
    _check_tls(config)
    return config


def _check_tls(config: Config) -> None:
    for name, path in (("tls.crt", config.tls_crt), ("tls.key", config.tls_key)):
        if not config.tls and path:
            raise ConfigError(f"flag -{name} is given, and -tls is not")
        if config.tls and not path:
            raise ConfigError(f"flag -tls needs -{name}")
        if config.tls:
            try:
                Path(path).open("rb").close()
            except OSError as exc:
                raise ConfigError(f"flag -{name}: {path}: {exc.strerror}") from None


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ConfigArgParse is untyped
    """ConfigArgParse with our errors in place of its exits."""

    def error(self, message: str) -> NoReturn:
        # Only what a config file brings can get here: arguments are normalised.
        unknown = re.search(r"unrecognized arguments: --([^=\s]+)", message)
        if unknown is not None:
            raise ConfigError(f"config file: {unknown[1]} is not a flag{_suggestion(unknown[1])}")
        raise ConfigError(f"config file: {message.splitlines()[0]}")


class _FileParser(configargparse.ConfigFileParser):  # type: ignore[misc]  # likewise
    """TOML or YAML, nested or with dotted keys."""

    def get_syntax_description(self) -> str:
        return _ACTIONS["config"]

    def parse(self, stream: IO[str]) -> dict[str, str | list[str]]:
        name = str(stream.name)
        syntax = "TOML" if name.endswith(".toml") else "YAML"
        try:
            text = stream.read()
            tree = tomllib.loads(text) if syntax == "TOML" else yaml.safe_load(text)
        except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError):
            # Not the parser's own text: it quotes the line, which may hold a password.
            raise ConfigError(f"config file {name}: it is not valid {syntax}") from None
        if not isinstance(tree or {}, dict):
            raise ConfigError(f"config file {name}: it is not a table of flags")
        return dict(_flattened(tree or {}, ""))


def _flattened(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, str | list[str]]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flattened(value, name + ".")
        elif value is not None:
            yield name, [_as_text(one) for one in value] if isinstance(value, list) else _as_text(value)


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
