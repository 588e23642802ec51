"""How a part of the daemon declares its settings: once, with everything there is to say of each.

A section is a frozen dataclass. Each of its fields is a setting:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class CacheConfig(Section):
        TITLE = "Cache"
        EXAMPLE = "mnemosyned -cache.size=1000000 -cache.bytes=2GiB"

        size: int = setting("cache.size", "100000", integer(1, 10**9), "sessions in the cache")

The flag, its environment variable, its place in the configuration file, `-help`, docs/flags.md, the
completion of shells, the process title and the log filter are all made from this declaration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar, cast

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

ENV_PREFIX: Final = "MNEMOSYNED_"
_METADATA_KEY: Final = "flag"

# Flags that belong to no section, with what -help says of them.
ACTIONS: Final = {
    "config": "file with flags: TOML if its name ends in .toml, else YAML; nested or dotted keys",
    "help": "show this text",
    "version": "show the version",
}

T = TypeVar("T")


class ConfigError(Exception):
    """A wrong flag, variable or file; the text is one line for the user, without any secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag: its name, its default as a user would write it, how its text is read, what it means."""

    name: str
    default: str
    parse: Callable[[str], Any]  # raises ValueError with what is wrong
    meaning: str
    is_secret: bool = False  # its value appears in no output: help, errors, logs, the process title
    is_list: bool = False  # its values add up when it is repeated
    is_boolean: bool = False  # it may stand without a value
    is_secret_file: bool = False  # its value names a file with a secret (files.py)
    choices: tuple[str, ...] = ()  # what completion offers
    shown: Callable[[str], str] | None = None  # of the field's value, what the log may show

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + re.sub(r"[.-]", "_", self.name).upper()


def setting(  # one place says everything of a setting
    name: str,
    default: str,
    parse: Callable[[str], T],
    meaning: str,
    *,
    is_secret: bool = False,
    is_list: bool = False,
    choices: Sequence[str] = (),
) -> T:
    """Declare a field of a Section; its type is what `parse` returns."""
    flag = Flag(
        name=name,
        default=default,
        parse=parse,
        meaning=meaning,
        is_secret=is_secret,
        is_list=is_list,
        is_boolean=getattr(parse, "is_boolean", False),
        is_secret_file=getattr(parse, "is_secret_file", False),
        choices=tuple(choices or getattr(parse, "choices", ())),
        shown=getattr(parse, "shown", None),
    )
    # To dataclasses it is a field without a default; to the type checker it is the field's value.
    return cast("T", field(metadata={_METADATA_KEY: flag}, repr=not is_secret))


class Section:
    """The settings of one part of the daemon; a base for frozen dataclasses."""

    __slots__ = ()

    TITLE: ClassVar[str]  # its heading in -help
    EXAMPLE: ClassVar[str]  # a command line for -help

    def resolved(self, sources: Mapping[str, str]) -> Self:  # noqa: ARG002  # for those that override it
        """Return the section with what the files that it names hold. Raises ConfigError.

        `sources` has each flag that was given, with words for where: flag, environment variable or file.
        """
        return self

    def secret_files(self) -> dict[str, str]:
        """Return the files with secrets that this section names, by the flag that names them."""
        names = {
            flag.name: getattr(self, field)
            for field, flag in flags_of(type(self)).items()
            if flag.is_secret_file
        }
        return {name: path for name, path in names.items() if path}

    def warnings(self) -> list[str]:
        """Return what is wrong without stopping the start, one line each, for `-check-config`."""
        return []

    def check(self, config: Config) -> None:
        """Check what concerns several settings, also of other sections. Raises ConfigError."""


def flags_of(section: type[Section]) -> dict[str, Flag]:
    """Return a section's flags by the name of their field, in order."""
    return {
        one.name: one.metadata[_METADATA_KEY]
        for one in fields(cast("Any", section))
        if _METADATA_KEY in one.metadata
    }


def flags_by_name(sections: Sequence[type[Section]]) -> dict[str, Flag]:
    """Return all flags of the sections by their own names, in order."""
    return {flag.name: flag for section in sections for flag in flags_of(section).values()}


def without_addresses(text: str) -> str:
    """Hide each quoted URL of an error text: one given to a wrong flag may hold a password."""
    return re.sub(r"(['\"]).*://.*\1", "an address", text, flags=re.DOTALL)
