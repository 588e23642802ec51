"""The commands of `mnemosyned <command>`: a table, and one module for each.

A command's module has `main(argv)`, which gets the arguments after the command's name and returns the exit
code: 0 done, 1 failed, 2 wrong usage. It is imported when it is called, since `mnemosyned cluster` needs no
storage, and `mnemosyned migrate` no gRPC; `mnemosyned -version` needs neither. To add a command, write the
module and add an entry to COMMANDS: help and completion follow from it.

Some modules are no commands: `on_storage.py`, `arguments.py`, `progress.py`, `new_file.py` and
`import_source.py` are what commands use, and `healthcheck.py` is a program for a container's HEALTHCHECK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from mnemosyned.config import help as flag_help
from mnemosyned.settings import SECTIONS


@dataclass(frozen=True, slots=True)
class Command:
    """One command, not yet imported."""

    module: str  # in this package
    meaning: str  # one line for -help and completion

    def run(self, argv: Sequence[str]) -> int:
        """Import the module and run the command; return the exit code."""
        main: Callable[[Sequence[str]], int] = import_module(f"mnemosyned.commands.{self.module}").main
        return main(argv)


COMMANDS: Final = {
    "cluster": Command("cluster", "show a cluster's members, ring and health; have a node leave"),
    "key": Command("key", "make an API key for the file of -auth.keys"),
    "migrate": Command("migrate", "hash the tokens of all stored sessions now"),
    "check": Command("check", "find damaged sessions in the storage; remove them with -fix"),
    "export": Command("export", "write all sessions of the storage into a file"),
    "import": Command("import_", "put the sessions of such a file into a storage"),
    "completion": Command("completion", "print the completion script of bash or zsh"),
}


def help_text() -> str:
    """Return what `mnemosyned -help` prints."""
    return flag_help.help_text(SECTIONS, {name: command.meaning for name, command in COMMANDS.items()})
