"""Flags, environment and file: parsed once, here, into a Config.

ConfigArgParse decides which source wins: the command line over the environment, that over the file, that
over the default. Its input is normalised before it sees it, because Go's spelling of flags is not
argparse's: one dash or two, no abbreviations, booleans without a value.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final, NoReturn, TypeVar, cast

import configargparse

from mnemosyned.config.files import MAX_CONFIG_BYTES, FileRefused, read_bytes, text_of
from mnemosyned.config.flags import (
    ACTIONS,
    ENV_PREFIX,
    ConfigError,
    Flag,
    Section,
    flags_by_name,
    flags_of,
    without_addresses,
)

S = TypeVar("S", bound=Section)

# What Kubernetes puts into MNEMOSYNED_PORT when there is a Service of our name.
_SERVICE_LINK: Final = re.compile(r"(tcp|udp|sctp)://")

# An address without a password, as that of a private server. The rest of such a file may be public.
_ADDRESS: Final = re.compile(r"embedded:.*|\w+://(?!.*(password|:[^/]*@)).*", re.DOTALL)


class Config:
    """What the daemon runs with: one value of each section, found by its type."""

    def __init__(
        self,
        sections: Mapping[type[Section], Section],
        *,
        given: Mapping[str, str] | None = None,
        secret_file: str = "",
    ) -> None:
        """`given` are the flags that were given, as text; `secret_file` is a file that has a secret."""
        self._sections = dict(sections)
        self._given = dict(given or {})
        self._secret_file = secret_file

    def shown(self, *, with_defaults: bool) -> dict[str, str]:
        """Return the flags by name as text, for the log: of each secret what its flag permits."""
        return {
            flag.name: _shown(flag, self._given.get(flag.name, flag.default), getattr(section, field))
            for section in self._sections.values()
            for field, flag in flags_of(type(section)).items()
            if with_defaults or flag.name in self._given
        }

    def secret_files(self) -> dict[str, str]:
        """Return the files with secrets that the daemon reads, by the names of the flags that name them."""
        found = {"config": self._secret_file} if self._secret_file else {}
        for section in self._sections.values():
            found |= section.secret_files()
        return found

    def warnings(self) -> list[str]:
        """Return what is wrong in the sections without stopping a start."""
        return [text for section in self._sections.values() for text in section.warnings()]

    def replaced(self, *sections: Section) -> Config:
        """Return a configuration with other values of these sections; `shown` shows what was given."""
        return Config(
            self._sections | {type(one): one for one in sections},
            given=self._given,
            secret_file=self._secret_file,
        )

    def __getitem__(self, section: type[S]) -> S:
        return cast("S", self._sections[section])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._sections == other._sections

    __hash__ = None  # type: ignore[assignment]  # no key of anything

    def __repr__(self) -> str:
        # The sections leave their secrets out.
        return f"Config({list(self._sections.values())})"


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str],
    sections: Sequence[type[Section]],
    *,
    only: Sequence[type[Section]] = (),
) -> Config:
    """Return the configuration; `-help` and `-version` are the caller's to handle.

    With `only`, the values of the other sections are not read, and what concerns several is not checked.

    Raises:
        ConfigError: anything wrong in any of the sources.
    """
    flags = flags_by_name(sections)
    arguments = list(_normalised(argv, flags))
    parser = _Parser(flags)
    parser.add_argument("--config", is_config_file_arg=True, env_var=ENV_PREFIX + "CONFIG")
    for flag in flags.values():
        parser.add_argument("--" + flag.name, env_var=flag.variable, action="append", dest=flag.name)
    found = parser.parse_args(arguments, env_vars=dict(_own_variables(environ, flags)))
    texts = {name: values for name, values in vars(found).items() if name != "config" and values}
    sources = _sources(arguments, environ, flags)
    config = Config(
        {section: _section(section, texts, sources) for section in only or sections},
        given={name: _text(flags[name], values) for name, values in texts.items()},
        secret_file=parser.file_with_secret,
    )
    for section in () if only else sections:
        config[section].check(config)
    return config


def _shown(flag: Flag, text: str, value: object) -> str:
    if flag.shown is not None:
        # The value: a file that another flag names may have it.
        return flag.shown(str(value))
    if flag.is_secret:
        return text and "[redacted]"
    # A password in the address of another service is none of ours, and still a secret; so is a parameter.
    without_password = re.sub("//.*@", "//[redacted]@", text, flags=re.DOTALL)
    return re.sub(r"\?.*", "?[redacted]", without_password, flags=re.DOTALL)


def _section(section: type[Section], texts: Mapping[str, list[str]], sources: Mapping[str, str]) -> Section:
    values = {name: _value(flag, texts.get(flag.name), sources) for name, flag in flags_of(section).items()}
    given = {name: source for name, source in sources.items() if name in texts}
    return section(**values).resolved(given)


def _value(flag: Flag, texts: list[str] | None, sources: Mapping[str, str]) -> Any:  # noqa: ANN401  # any field's
    text = flag.default
    if texts:
        text = _text(flag, texts)
    if not _is_unicode(text):
        raise ConfigError(f"{sources[flag.name]}: it is not UTF-8")
    try:
        return flag.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{sources[flag.name]}: {without_addresses(str(exc))}") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line or the environment that are no text
        return False
    return True


def _text(flag: Flag, given: list[str]) -> str:
    return ",".join(given) if flag.is_list else given[-1]


def _normalised(argv: Sequence[str], flags: Mapping[str, Flag]) -> Iterator[str]:
    """Yield every flag as `--name=value`."""
    rest = iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            # Never the argument itself: it may be the end of a secret with a space in it.
            position = argv.index(argument) + 1
            raise ConfigError(f"argument {position} is not a flag; booleans take their value as -flag=false")
        name, value = match[1], match[2]
        if name not in flags and name != "config":
            raise ConfigError(f"flag -{_name_in(name)} is not known{_suggestion(name, flags)}")
        if value is None:
            flag = flags.get(name)
            value = "true" if flag is not None and flag.is_boolean else next(rest, None)
            if value is None:
                raise ConfigError(f"flag -{name} needs a value")
        yield f"--{name}={value}"


def _name_in(text: str) -> str:
    """Return the beginning that may be a flag's name; the rest, as in `-flag:value`, may be a secret."""
    found = re.match(r"[\w.-]*", text)
    return found[0] if found else ""


def _suggestion(name: str, flags: Mapping[str, Flag]) -> str:
    close = difflib.get_close_matches(name, [*flags, *ACTIONS], n=1)
    return f"; did you mean -{close[0]}?" if close else ""


def _own_variables(environ: Mapping[str, str], flags: Mapping[str, Flag]) -> Iterator[tuple[str, str]]:
    for name in (*(flag.variable for flag in flags.values()), ENV_PREFIX + "CONFIG"):
        value = environ.get(name)
        if value and not (name == ENV_PREFIX + "PORT" and _SERVICE_LINK.match(value)):
            yield name, value


def _sources(
    arguments: Sequence[str], environ: Mapping[str, str], flags: Mapping[str, Flag]
) -> dict[str, str]:
    """Say where each flag's value comes from, for complaints."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    variables = dict(_own_variables(environ, flags))
    return {
        flag.name: f"flag -{flag.name}"
        if flag.name in given
        else f"flag -{flag.name} from the environment variable {flag.variable}"
        if flag.variable in variables
        else f"flag -{flag.name} from the config file"
        for flag in flags.values()
    }


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ConfigArgParse is untyped
    """ConfigArgParse with our errors in place of its exits."""

    def __init__(self, flags: Mapping[str, Flag]) -> None:
        super().__init__(
            add_help=False,
            allow_abbrev=False,
            config_file_parser_class=_FileParser,
            config_file_open_func=self._open,
        )
        self._flags = flags
        self.file_with_secret = ""
        self._refusal: ConfigError | None = None

    def _open(self, path: str) -> IO[str]:
        # The library puts a text of its own before that of any error here, and gives it to `error`.
        try:
            return self._opened(path)
        except ConfigError as exc:
            self._refusal = exc
            raise

    def _opened(self, path: str) -> IO[str]:
        """Return the content of the configuration file. Raises ConfigError."""
        from mnemosyned.config.config_file import settings_in, syntax_of  # only with a file

        try:
            content = read_bytes(path, holds_secret=False, max_bytes=MAX_CONFIG_BYTES)
        except FileRefused as exc:
            raise ConfigError(f"config file {path}: {exc}") from None
        try:
            stream = _ReadFile(text_of(content))
        except FileRefused as exc:
            raise ConfigError(f"config file {path}: it is not valid {syntax_of(path)}: {exc}") from None
        stream.name = path  # the library asks for it, as of any file
        found = stream.settings = settings_in(stream, self._flags)
        for name, value in found.items():
            if isinstance(value, list) and name in self._flags and not self._flags[name].is_list:
                raise ConfigError(f"config file {path}: {name} takes one value, and not a list")
        has_secret = any(self._is_secret(name, value) for name, value in found.items())
        if has_secret:
            self.file_with_secret = path
            try:
                # Only now it is known that the stricter rule applies.
                read_bytes(path, holds_secret=True, max_bytes=MAX_CONFIG_BYTES)
            except FileRefused as exc:
                raise ConfigError(f"config file {path}, which has a secret: {exc}") from None
        return stream

    def _is_secret(self, name: str, value: str | list[str]) -> bool:
        flag, texts = self._flags.get(name), [value] if isinstance(value, str) else value
        return flag is not None and flag.is_secret and not all(map(_ADDRESS.fullmatch, texts))

    def error(self, message: str) -> NoReturn:
        # Only a config file can cause this: arguments are normalised.
        if self._refusal is not None:
            raise self._refusal from None
        unknown = re.search(r"unrecognized arguments: --([^=\s]+)", message)
        if unknown is not None:
            name = unknown[1]
            raise ConfigError(f"config file: {_name_in(name)} is not a flag{_suggestion(name, self._flags)}")
        raise ConfigError(f"config file: {message.splitlines()[0]}")


class _ReadFile(io.StringIO):
    """A configuration file that has been read, with what is in it."""

    name: str
    settings: dict[str, str | list[str]]


class _FileParser(configargparse.ConfigFileParser):  # type: ignore[misc]  # untyped as well
    """TOML or YAML, nested or with dotted keys."""

    def get_syntax_description(self) -> str:
        return ACTIONS["config"]

    def parse(self, stream: _ReadFile) -> dict[str, str | list[str]]:
        return stream.settings
