"""Flags, environment and file: parsed once, here, into a Config.

ConfigArgParse decides which source wins. Its input is normalised before it sees it, because Go's
spelling of flags is not argparse's: one dash or two, no abbreviations, booleans without a value.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Final, NoReturn

import configargparse
import yaml

from mnemosyned import __version__
from mnemosyned.config.flags import (
    ACTIONS,
    ENV_PREFIX,
    FLAG_BY_NAME,
    FLAGS,
    MAX_SECRETS,
    Flag,
    help_text,
    postgres_address,
    secrets,
)

_MAX_TOUCH_INTERVAL_S: Final = 10.0
_MIN_TOKEN_KEY: Final = 32
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
    grpc_max_streams: int
    grpc_max_connections: int
    drain_delay_s: float
    drain_timeout_s: float
    cluster_listen: str
    cluster_seeds: tuple[str, ...]
    cluster_label: str
    cluster_secret: tuple[str, ...] = field(repr=False)  # those of the file included
    cluster_secret_file: str
    ttl_s: float
    ttc_s: float
    touch_interval_s: float
    cache_size: int
    cache_bytes: int
    cache_ttl_s: float
    cache_negative_bytes: int
    bag_max_entries: int
    bag_max_key_bytes: int
    bag_max_value_bytes: int
    token_protection: str
    token_key_file: str
    token_keys: tuple[str, ...] = field(repr=False)  # of the file
    log_environment: str
    log_level: str
    storage: str
    postgres_address: str = field(repr=False)  # that of the file, if there is one
    postgres_address_file: str
    postgres_table: str
    postgres_schema: str
    postgres_pool_size: int
    postgres_connect_timeout_s: float
    postgres_statement_timeout_s: float
    postgres_bin: str
    tls: bool
    tls_crt: str
    tls_key: str
    tls_ca: str
    tls_client_auth: str
    tls_peer_names: tuple[str, ...]
    auth_keys: str
    tracing_agent_address: str
    check_config: bool


# Nobody gives these themselves.
_FROM_FILES: Final = frozenset({"token_keys"})
assert {flag.field for flag in FLAGS} == {one.name for one in fields(Config)} - _FROM_FILES


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the configuration; `-help` and `-version` print and raise SystemExit(0).

    The command line wins over the environment, that over the file, that over the default.

    Raises:
        ConfigError: anything wrong in any of them.
    """
    arguments = list(_normalised(argv))
    names = {argument.partition("=")[0] for argument in arguments}
    if "--help" in names or "--version" in names:
        sys.stdout.write(help_text() if "--help" in names else f"mnemosyned {__version__}\n")
        raise SystemExit(0)
    parser = _Parser(add_help=False, allow_abbrev=False, config_file_parser_class=_FileParser)
    parser.add_argument("--config", is_config_file_arg=True, env_var=ENV_PREFIX + "CONFIG")
    for flag in FLAGS:
        parser.add_argument("--" + flag.name, env_var=flag.variable, action="append", dest=flag.name)
    found = parser.parse_args(arguments, env_vars=dict(_own_variables(environ)))
    texts = {name: values for name, values in vars(found).items() if name != "config" and values}
    sources = _sources(arguments, environ)
    if {"postgres.address", "postgres.address.file"} <= texts.keys():
        raise ConfigError(f"{sources['postgres.address.file']}: -postgres.address is given as well")
    values = {flag.field: _value(flag, texts.get(flag.name), sources) for flag in FLAGS}
    return _checked(values)


def _normalised(argv: Sequence[str]) -> Iterator[str]:
    """Yield every flag as `--name=value`."""
    rest = iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            # Never itself: it may be the end of a secret with a space in it.
            position = argv.index(argument) + 1
            raise ConfigError(f"argument {position} is not a flag; booleans take their value as -flag=false")
        name, value = ("help" if match[1] == "h" else match[1]), match[2]
        if name not in FLAG_BY_NAME and name not in ACTIONS:
            raise ConfigError(f"flag -{_name_in(name)} is not known{_suggestion(name)}")
        if value is None and name not in {"help", "version"}:
            flag = FLAG_BY_NAME.get(name)
            value = "true" if flag is not None and flag.is_boolean else next(rest, None)
            if value is None:
                raise ConfigError(f"flag -{name} needs a value")
        yield f"--{name}" if value is None else f"--{name}={value}"


def _name_in(text: str) -> str:
    """Return what may be a flag's name at the beginning: behind it, as in `-flag:value`, may be a secret."""
    found = re.match(r"[\w.-]*", text)
    return found[0] if found else ""


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*FLAG_BY_NAME, *ACTIONS], n=1)
    return f"; did you mean -{close[0]}?" if close else ""


def _own_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in (*(flag.variable for flag in FLAGS), ENV_PREFIX + "CONFIG"):
        value = environ.get(name)
        if value and not (name == ENV_PREFIX + "PORT" and _SERVICE_LINK.match(value)):
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
        text = ",".join(texts) if flag.is_list else texts[-1]
    try:
        return flag.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{sources[flag.name]}: {without_addresses(str(exc))}") from None


def without_addresses(text: str) -> str:
    """Hide each quoted URL of a complaint: one given to a wrong flag may hold a password."""
    return re.sub(r"(['\"]).*://.*\1", "an address", text, flags=re.DOTALL)


def _checked(values: dict[str, Any]) -> Config:
    """Check what concerns several flags."""
    if not values["touch_interval_s"]:
        values["touch_interval_s"] = min(values["ttl_s"] / 10, _MAX_TOUCH_INTERVAL_S)
    values["cluster_secret"] += _secrets_in(values["cluster_secret_file"])
    if values["postgres_address_file"]:
        values["postgres_address"] = _address_in(values["postgres_address_file"])
    values["token_keys"] = _token_keys_in(values["token_key_file"])
    config = Config(**values)
    if config.touch_interval_s > config.ttl_s / 4:
        raise ConfigError("flag -touch.interval: more than a quarter of -ttl")
    if config.token_protection != "none" and not config.token_keys:  # noqa: S105  # a mode
        raise ConfigError("flag -token.protection: hmac needs -token.key.file")
    _check_cluster(config)
    _check_tls(config)
    return config


def _check_cluster(config: Config) -> None:
    others = [seed for seed in config.cluster_seeds if seed != config.cluster_listen]
    if config.storage == "memory" and others:
        raise ConfigError("flag -storage: memory is for a single node, and -cluster.seeds names others")
    if others and not config.cluster_listen:
        raise ConfigError("flag -cluster.seeds names others, who need -cluster.listen to dial this node")
    if len(config.cluster_secret) > MAX_SECRETS:
        raise ConfigError(f"flag -cluster.secret: more than {MAX_SECRETS} secrets; two are for a rotation")


def _secrets_in(path: str) -> tuple[str, ...]:
    if not path:
        return ()
    words = _words_in("cluster.secret.file", path)
    try:
        found = secrets(",".join(words))
    except ValueError as exc:
        raise ConfigError(f"flag -cluster.secret.file: {path}: {exc}") from None
    return found


def _token_keys_in(path: str) -> tuple[str, ...]:
    if not path:
        return ()
    keys = tuple(dict.fromkeys(_words_in("token.key.file", path)))
    if any(len(key) < _MIN_TOKEN_KEY for key in keys):
        raise ConfigError(
            f"flag -token.key.file: {path}: a key is shorter than {_MIN_TOKEN_KEY} characters; "
            "try `openssl rand -hex 32`"
        )
    if len(keys) > MAX_SECRETS:
        raise ConfigError(
            f"flag -token.key.file: {path}: more than {MAX_SECRETS} keys; two are for a rotation"
        )
    return keys


def _address_in(path: str) -> str:
    words = _words_in("postgres.address.file", path)
    try:
        return postgres_address(" ".join(words))
    except ValueError as exc:
        raise ConfigError(f"flag -postgres.address.file: {path}: {exc}") from None


def _words_in(flag: str, path: str) -> list[str]:
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        # A word alone may be the secret itself, given to the wrong flag.
        shown = path if "/" in path else "its file"
        raise ConfigError(f"flag -{flag}: {shown}: {reason}") from None
    if not words:
        raise ConfigError(f"flag -{flag}: {path}: it is empty")
    return words


def _check_tls(config: Config) -> None:
    files = {"tls.crt": config.tls_crt, "tls.key": config.tls_key, "tls.ca": config.tls_ca}
    for name, path in files.items():
        if not config.tls and path:
            raise ConfigError(f"flag -{name} is given, and -tls is not")
        if config.tls and not path and name != "tls.ca":
            raise ConfigError(f"flag -tls needs -{name}")
        if path:
            try:
                Path(path).open("rb").close()
            except OSError as exc:
                raise ConfigError(f"flag -{name}: {path}: {exc.strerror}") from None
    _check_client_auth(config)


def _check_client_auth(config: Config) -> None:
    how = config.tls_client_auth
    if how != "none" and not config.tls_ca:
        raise ConfigError(f"flag -tls.client-auth: {how} needs -tls.ca, and that -tls")
    if how == "optional" and config.grpc_engine == "grpcio":
        raise ConfigError("flag -tls.client-auth: -grpc.engine=grpcio knows none and require only")
    if config.tls_peer_names and how == "none":
        raise ConfigError("flag -tls.peer-names: nodes show no certificate while -tls.client-auth is none")


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ConfigArgParse is untyped
    """ConfigArgParse with our errors in place of its exits."""

    def error(self, message: str) -> NoReturn:
        # Only what a config file brings can get here: arguments are normalised.
        unknown = re.search(r"unrecognized arguments: --([^=\s]+)", message)
        if unknown is not None:
            name = unknown[1]
            raise ConfigError(f"config file: {_name_in(name)} is not a flag{_suggestion(name)}")
        raise ConfigError(f"config file: {message.splitlines()[0]}")


class _FileParser(configargparse.ConfigFileParser):  # type: ignore[misc]  # likewise
    """TOML or YAML, nested or with dotted keys."""

    def get_syntax_description(self) -> str:
        return ACTIONS["config"]

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
