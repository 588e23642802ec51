"""The process title, which every user of the machine may read: the command line without its secrets."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Final

from setproctitle import getproctitle, setproctitle, setthreadtitle

PROGRAM: Final = "mnemosyned"
_HIDDEN: Final = "…"
# Keeps the library out of the environment, whose memory follows the arguments': /proc/PID/environ stays.
_ARGUMENTS_ONLY: Final = "SPT_NOENV"


def hide_secrets(arguments: Sequence[str], secret_flags: Collection[str]) -> None:
    """Replace the process title by one without secrets, if these arguments hold any.

    Where that does not work, the standard error says so: the operator relies on it.
    """
    shown = without_secrets(arguments, secret_flags)
    if shown == list(arguments):
        return
    # Arguments that are not UTF-8 hold surrogates, which have no encoding.
    title = " ".join([PROGRAM, *shown]).encode(errors="replace").decode()
    is_ours = _ARGUMENTS_ONLY not in os.environ
    os.environ.setdefault(_ARGUMENTS_ONLY, "1")
    setproctitle(title)
    if is_ours:
        del os.environ[_ARGUMENTS_ONLY]
    # The library cut the title off there, as the kernel does: `ps -C` and `pkill` want the name alone.
    setthreadtitle(PROGRAM)
    if not title.startswith(getproctitle() or "?"):
        sys.stderr.write(f"{PROGRAM}: every user here can read the command line: give secrets in a file\n")


def without_secrets(arguments: Sequence[str], secret_flags: Collection[str]) -> list[str]:
    """Return the arguments with a mark in place of each secret, address and token."""
    if list(arguments[:1]) == ["cluster"] and "whois" in arguments:
        # The token may be anywhere behind it.
        at = arguments.index("whois")
        behind = [_HIDDEN] if arguments[at + 1 :] else []
        return [*without_secrets(arguments[:at], secret_flags), "whois", *behind]
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_flag = re.sub("^--?", "", name) in secret_flags and name.startswith("-")
        if is_secret:
            shown.append(_HIDDEN)
        elif is_flag and equals:
            shown.append(f"{name}={_HIDDEN}")
        else:
            # Whatever flag it was meant for.
            shown.append(re.sub("://.*@", f"://{_HIDDEN}@", argument, flags=re.DOTALL))
        is_secret = is_flag and not equals and not is_secret
    return shown
