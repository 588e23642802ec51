"""The commands of `mnemosyned <command>`, each in a module of its own that is imported when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from mnemosyned.config import help as flag_help
from mnemosyned.settings import SECTIONS


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its module has `main(argv)`, which returns the exit code."""

    module: str
    meaning: str

    def run(self, argv: Sequence[str]) -> int:
        """Run it; return the exit code."""
        main: Callable[[Sequence[str]], int] = import_module(f"mnemosyned.commands.{self.module}").main
        return main(argv)


COMMANDS: Final = {
    "cluster": Command("cluster", "show a cluster's members, ring and health; have a node leave"),
    "key": Command("key", "make an API key for the file of -auth.keys"),
    "migrate": Command("migrate", "hash the tokens of all stored sessions now"),
    "completion": Command("completion", "print the completion script of bash or zsh"),
}


def help_text() -> str:
    """Return what `mnemosyned -help` prints."""
    return flag_help.help_text(SECTIONS, {name: command.meaning for name, command in COMMANDS.items()})
