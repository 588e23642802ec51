"""The flags: their names, defaults, meanings, and how the text of each is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mnemosyned.config.duration import format_duration, parse_duration
from mnemosyned.sessions.bag import MAX_BAG_BYTES

ENV_PREFIX: Final = "MNEMOSYNED_"
_LEVELS: Final = ("debug", "info", "warn", "error", "dpanic", "panic", "fatal")
_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_BYTES_BY_UNIT: Final = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_MAX_IDENTIFIER_BYTES: Final = 63
_MIN_SECRET: Final = 16
MAX_SECRETS: Final = 2


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
        return ENV_PREFIX + re.sub(r"[.-]", "_", self.name).upper()

    @property
    def is_boolean(self) -> bool:
        """Whether it may stand without a value."""
        return self.parse is boolean

    @property
    def is_list(self) -> bool:
        """Whether its values add up when it is repeated."""
        return self.parse in (_nodes, names, secrets)


def boolean(text: str) -> bool:
    """Read a Go boolean. Raises ValueError."""
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


def node(text: str) -> str:
    """Read host:port. Raises ValueError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(\d{1,5})", text, re.ASCII)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ValueError(f"{text!r} is not an address of the form host:port")
    return text


def _node_or_nothing(text: str) -> str:
    return node(text) if text else ""


def _nodes(text: str) -> tuple[str, ...]:
    stripped = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(node(part) for part in stripped if part))


def secrets(text: str) -> tuple[str, ...]:
    """Read secrets separated by commas. Raises ValueError, whose text shows none of them."""
    found = tuple(dict.fromkeys(part for part in (part.strip() for part in text.split(",")) if part))
    if any(len(secret) < _MIN_SECRET for secret in found):
        raise ValueError(f"a secret is shorter than {_MIN_SECRET} characters; try `openssl rand -hex 32`")
    return found


def names(text: str) -> tuple[str, ...]:
    """Read names of hosts separated by commas. Raises ValueError."""
    found = tuple(dict.fromkeys(part for part in (part.strip() for part in text.split(",")) if part))
    for name in found:
        if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_.:-]+", name):
            raise ValueError(f"{name!r} is not a host name, or *. and a domain")
    return found


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,63}", text):
        raise ValueError(f"{text!r} is not a label of at most 63 letters, digits, dots, dashes, underscores")
    return text


def _file(text: str) -> str:
    """Read the name of a file. Raises ValueError, whose text shows nothing: it may be what is to be in it."""
    if "://" in text or "\n" in text or text.startswith(("mnk_", "sha256:")):
        raise ValueError("it is not the name of a file, but perhaps what should be in one")
    return text


def postgres_address(text: str) -> str:
    """Read the address of a PostgreSQL. Raises ValueError, whose text does not show it."""
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
    Flag(
        "grpc.max-streams",
        "1024",
        _integer(1, 2**31 - 1),
        "calls that one connection may have in flight; more wait at the client",
        "grpc_max_streams",
    ),
    Flag(
        "grpc.max-connections",
        "10000",
        _integer(1, 2**31 - 1),
        "connections of clients and other nodes; more wait for one to end (grpcio closes them)",
        "grpc_max_connections",
    ),
    Flag("grpc.debug", "false", boolean, "very verbose gRPC logging", "grpc_debug"),
    Flag(
        "drain.delay",
        "200ms",
        _duration(0),
        "how long new calls are still taken after SIGTERM, for balancers to see NOT_SERVING",
        "drain_delay_s",
    ),
    Flag(
        "drain.timeout",
        "10s",
        _duration(0),
        "how long calls in flight may go on after that",
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
        "cache.negative.bytes",
        "32MiB",
        _size(0, _ANY_SIZE),
        "memory to remember unknown tokens in for -cache.ttl, about 480 bytes each; 0: none is",
        "cache_negative_bytes",
    ),
    Flag("bag.max-entries", "10000", _integer(1, 10**6), "entries of a bag", "bag_max_entries"),
    Flag(
        "bag.max-key",
        "64KiB",
        _size(1, MAX_BAG_BYTES),
        "longest key of a bag, in bytes or with KiB, MiB",
        "bag_max_key_bytes",
    ),
    Flag(
        "bag.max-value",
        "4000000",
        _size(1, MAX_BAG_BYTES),
        "longest value of a bag, likewise; all of it together has at most 4000000 bytes",
        "bag_max_value_bytes",
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
        postgres_address,
        "postgres:// URL; or embedded: for a private server, embedded:///dir with its data there",
        "postgres_address",
    ),
    Flag(
        "postgres.address.file",
        "",
        _file,
        "file with the URL instead, such as a secret that is mounted",
        "postgres_address_file",
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
        "addresses of other nodes, comma-separated; may be repeated; a name may have many addresses",
        "cluster_seeds",
    ),
    Flag(
        "cluster.secret",
        "",
        secrets,
        "secret that all nodes share; two, comma-separated, in a rotation: the first signs",
        "cluster_secret",
    ),
    Flag(
        "cluster.secret.file",
        "",
        _file,
        "file with the secret, or with two in a rotation, one a line",
        "cluster_secret_file",
    ),
    Flag(
        "cluster.label",
        "",
        _label,
        "name of the cluster; nodes with another one are refused",
        "cluster_label",
    ),
    Flag(
        "token.protection",
        "none",
        _one_of("none", "hmac"),
        "what the storage keeps of a token: none (the token itself) or hmac (its HMAC-SHA256)",
        "token_protection",
    ),
    Flag(
        "token.key.file",
        "",
        _file,
        "file with the key of the HMAC, or with two in a rotation, one a line; the first is in use",
        "token_key_file",
    ),
    Flag(
        "log.environment",
        "production",
        _one_of("production", "development", "stackdriver"),
        "form of the log: production (JSON), development or stackdriver",
        "log_environment",
    ),
    Flag("log.level", "info", _one_of(*_LEVELS), f"least level logged: {', '.join(_LEVELS)}", "log_level"),
    Flag("tls", "false", boolean, "serve both ports, and dial other nodes, over TLS", "tls"),
    Flag("tls.crt", "", _file, "PEM file of this node's certificate chain", "tls_crt"),
    Flag("tls.key", "", _file, "PEM file of its private key", "tls_key"),
    Flag(
        "tls.ca",
        "",
        _file,
        "PEM file of the authorities that sign the certificates of clients and of other nodes",
        "tls_ca",
    ),
    Flag(
        "tls.client-auth",
        "none",
        _one_of("none", "optional", "require"),
        "whether gRPC clients show a certificate: none, optional (not with grpcio) or require",
        "tls_client_auth",
    ),
    Flag(
        "tls.peer-names",
        "",
        names,
        "names in the certificates of nodes, comma-separated, also *.domain; they then need no secret",
        "tls_peer_names",
    ),
    Flag(
        "auth.keys",
        "",
        _file,
        "file of who may call, a line each: a role, and a key's hash or a certificate's name; empty: all may",
        "auth_keys",
    ),
    Flag(
        "tracing.agent.address",
        "",
        str,
        "OTLP endpoint for traces, host:port or URL; needs the extra otel",
        "tracing_agent_address",
    ),
    Flag("check-config", "false", boolean, "check flags, environment and file, and exit", "check_config"),
)
FLAG_BY_NAME: Final = {flag.name: flag for flag in FLAGS}
ACTIONS: Final = {
    "config": "file with flags, TOML if it ends so, else YAML; nested or dotted keys",
    "help": "show this text",
    "version": "show the version",
}


def flag_table() -> str:
    """Return the flags as a Markdown table."""
    rows = ["| flag | default | environment | meaning |", "|---|---|---|---|"]
    for flag in FLAGS:
        default = f"`{flag.default}`" if flag.default else ""
        rows.append(f"| `-{flag.name}` | {default} | `{flag.variable}` | {flag.meaning} |")
    rows.append(f"| `-config` | | `{ENV_PREFIX}CONFIG` | {ACTIONS['config']} |")
    rows += [f"| `-{name}` | | | {ACTIONS[name]} |" for name in ("help", "version")]
    return "\n".join(rows) + "\n"


def help_text() -> str:
    """Return what `-help` prints."""
    lines = [
        "usage: mnemosyned [flags]",
        "       mnemosyned cluster members|ring|whois|check|leave [-help]",
        "       mnemosyned key [-help]",
        "       mnemosyned migrate [flags]",
        "",
        "A flag takes one dash or two: -ttl 24m, --ttl=24m.",
        "",
    ]
    for flag in FLAGS:
        lines.append(f"  -{flag.name}")
        default = f" (default {flag.default})" if flag.default else ""
        lines.append(f"        {flag.meaning}{default} [{flag.variable}]")
    for name, meaning in ACTIONS.items():
        lines += [f"  -{name}", f"        {meaning}"]
    return "\n".join(lines) + "\n"
