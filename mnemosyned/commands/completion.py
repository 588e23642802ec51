"""`mnemosyned completion bash|zsh`: print a script that completes flags and commands in that shell.

The script is made from the same tables as `-help`, so it cannot miss a flag. It contains the words
themselves and does not run mnemosyned at each Tab, which would take 0.15 s. After an upgrade it must be
loaded again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from mnemosyned.commands import COMMANDS
from mnemosyned.commands.arguments import CommandParser
from mnemosyned.config.help import completion_script
from mnemosyned.settings import SECTIONS

_EPILOG: Final = "Try it: source <(mnemosyned completion bash)"


def main(argv: Sequence[str]) -> int:
    """Print the script; return the exit code."""
    parser = CommandParser(
        "mnemosyned completion",
        description="Print a script that completes flags and commands in a shell.",
        epilog=_EPILOG,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    arguments = parser.parse_args(argv)
    sys.stdout.write(completion_script(arguments.shell, SECTIONS, COMMANDS))
    return 0
