"""The parser of commands' own arguments, which keeps secrets out of its error texts."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from mnemosyned.config.flags import without_addresses


class CommandParser(argparse.ArgumentParser):
    """argparse, whose errors repeat no argument that may be a secret."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and end the process with exit code 2."""
        # argparse quotes what it does not understand: the secret behind a misspelt flag, or a second token.
        # The choices of "invalid choice" stay, since they are constants.
        kinds = "unrecognized arguments|ambiguous option|ignored explicit argument|invalid choice"
        text = re.sub(rf"({kinds})\b.*?( \(choose .*)?$", r"\1\2", message, flags=re.DOTALL)
        super().error(without_addresses(text))
