"""`mnemosyned key`: make an API key, or take one, and print its line for the file of -auth.keys.

The first line of the output is the new key, for the caller. The last line is its hash, for the file: who
reads the file learns no key. With `-`, the key is on standard input, since an argument would be visible to
other users of the machine; then only the line for the file is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mnemosyned.commands.arguments import CommandParser
from mnemosyned.security.api_keys import MIN_KEY_LENGTH, Role, line_of, new_key


def main(argv: Sequence[str]) -> int:
    """Print a key and its line; return the exit code: 0 done, 2 the given key is too short."""
    parser = CommandParser(
        "mnemosyned key",
        description="Make an API key for the file of -auth.keys, which has only the key's hash.",
        epilog="Callers send the key as metadata x-api-key. It is printed once and not stored.",
    )
    words = [role.word for role in Role]
    parser.add_argument("role", nargs="?", choices=words, default="session", help="default: session")
    parser.add_argument(
        "-", dest="is_given", action="store_true", help="hash the key on the standard input instead"
    )
    arguments = parser.parse_args(argv)
    role = Role[arguments.role.upper()]
    key = sys.stdin.readline().strip() if arguments.is_given else new_key()
    if len(key) < MIN_KEY_LENGTH:
        # The hash is not salted or slow, so it protects long random keys only.
        sys.stderr.write(f"mnemosyned: the key is shorter than {MIN_KEY_LENGTH} characters\n")
        return 2
    if not arguments.is_given:
        sys.stdout.write(f"{key}\n")
    sys.stdout.write(f"{line_of(key, role)}\n")
    return 0
