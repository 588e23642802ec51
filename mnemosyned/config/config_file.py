"""The configuration file: TOML or YAML, nested or with dotted keys, as texts by the names of flags.

    cache:                       cache.size: 10
      size: 10        ──>
    cache.size: 10    ──>        given twice: refused

A value is taken as it is written, as on the command line. YAML has forms of its own:

- To it, `0123` is 83, and `1:30` is 90. Such a number is refused, with its key.
- `no` is false to it. It is for a boolean flag; for any other flag it is the text `no`.
- A key without a value is null. For a flag it is refused, since it may stand for the default or for nothing.

Errors never quote a value or a line, which may be a secret.

Imported only if there is a file: YAML takes long to import.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mnemosyned.config.flags import ConfigError

if TYPE_CHECKING:
    from mnemosyned.config.flags import Flag

Settings = dict[str, str | list[str]]

_DECIMAL: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BOOLEANS: Final = {"yes": "true", "on": "true", "true": "true"}  # all others are false
_PLAIN: Final = frozenset({"str", "int", "float", "timestamp"})
# As on the command line, one dash or two may be in front.
_NAME: Final = re.compile(r"-{0,2}(\w[\w.-]*)", re.ASCII)
_GIVEN_TWICE: Final = ("Cannot overwrite", "Cannot declare", "Cannot mutate", "Cannot redefine")
_TAG: Final = "tag:yaml.org,2002:"


class _Refused(Exception):
    """The file has a key or a value that could mean two things; the text names the key."""


def syntax_of(path: str) -> str:
    """Return the language of a file, by its name."""
    return "TOML" if path.endswith(".toml") else "YAML"


def settings_in(stream: IO[str], flags: Mapping[str, Flag]) -> Settings:
    """Return the settings of an open file, by the names of their flags. Raises ConfigError.

    A name that no flag has is returned too.
    """
    name = str(stream.name)
    text = stream.read()
    try:
        if syntax_of(name) == "TOML":
            return _once_each(_flattened(tomllib.loads(text), ""))
        return _once_each(_flattened_root(yaml.compose(text, Loader=yaml.SafeLoader), flags))
    except _Refused as exc:
        raise ConfigError(f"config file {name}: {exc}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        # Not the parser's own text: it quotes the line, which may hold a password. A YAML table may contain
        # itself.
        # tomllib's text for a key that is given twice has no quotation, and begins alike.
        is_twice = str(exc).startswith(_GIVEN_TWICE)
        what = "a key is given twice" if is_twice else f"it is not valid {syntax_of(name)}"
        raise ConfigError(f"config file {name}: {what}{_place(exc)}") from None


def _once_each(settings: Iterator[tuple[str, str | list[str]]]) -> Settings:
    found: Settings = {}
    for key, value in settings:
        match = _NAME.fullmatch(key)
        if match is None:
            raise _Refused(f"{_shown(key)} is not the name of a flag")
        name = match[1]
        if name == "config":
            raise _Refused("config names this file, and cannot be given in it")
        if name in found:
            raise _Refused(f"{_shown(name)} is given twice")
        found[name] = value
    return found


def _flattened(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, str | list[str]]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flattened(value, name + ".")
        elif isinstance(value, list):
            if any(isinstance(one, list | dict) for one in value):
                raise _Refused(f"{_shown(name)} is a list of more than values")
            yield name, [_as_text(one) for one in value]
        else:
            yield name, _as_text(value)


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flattened_root(root: Node | None, flags: Mapping[str, Flag]) -> Iterator[tuple[str, str | list[str]]]:
    if isinstance(root, MappingNode):
        yield from _flattened_nodes(root, "", flags)
    elif root is not None:
        raise _Refused("it is not a table of flags")


def _flattened_nodes(
    table: MappingNode, prefix: str, flags: Mapping[str, Flag]
) -> Iterator[tuple[str, str | list[str]]]:
    for key, value in table.value:
        if not isinstance(key, ScalarNode):
            raise _Refused(f"a key in line {key.start_mark.line + 1} is not a name")
        name = f"{prefix}{key.value}"
        flag = flags.get(name.lstrip("-"))
        if isinstance(value, MappingNode):
            yield from _flattened_nodes(value, name + ".", flags)
        elif isinstance(value, SequenceNode):
            yield name, [_text_of(name, one, flag) for one in value.value]
        # A table of which all lines are comments is null too, and it is no flag.
        elif flag is not None or _kind_of(value) != "null":
            yield name, _text_of(name, value, flag)


def _text_of(name: str, node: Node, flag: Flag | None) -> str:
    """Return a value as it is written."""
    if not isinstance(node, ScalarNode):
        raise _Refused(f"{_shown(name)} is a list of more than values")
    kind = _kind_of(node)
    if kind == "null":
        raise _Refused(f"{_shown(name)} has no value; leave it out, or write an empty text as two quotes")
    if kind == "bool":
        is_text = flag is not None and not flag.is_boolean
        return str(node.value) if is_text else _BOOLEANS.get(node.value.lower(), "false")
    # `0o17` and `08` are octal to some, and text to YAML 1.1.
    looks_octal = node.style is None and re.fullmatch(r"[-+]?0[0-9_o][0-9_]*", node.value)
    if looks_octal or (kind == "int" and not _DECIMAL.fullmatch(node.value)):
        raise _Refused(
            f"{_shown(name)}: YAML reads numbers such as 0123, 0x7b, 1_000 and 1:30 in its own way; "
            "write the number in decimal, or the text in quotes"
        )
    if kind not in _PLAIN:
        raise _Refused(f"{_shown(name)} has a type of its own, and plain text is needed")
    return str(node.value)


def _kind_of(node: Node) -> str:
    return str(node.tag.removeprefix(_TAG))


def _shown(name: str) -> str:
    """Return what may be a flag's name; the rest may be a secret."""
    found = re.match(r"[\w.-]*", name)
    return found[0] if found and found[0] else "a key"


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f", in line {mark.line + 1}"
    found = re.search(r"\(at line (\d+),", str(error))
    return f", in line {found[1]}" if found else ""
