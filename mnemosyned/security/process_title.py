"""The process title, which every user of the machine may read: the command line without its secrets.

`ps` shows the arguments of every process to every user. A secret belongs in a file or the environment, but it
can also be given as a flag. Then the process title is replaced at the start, before anything else runs:

    mnemosyned -postgres.address=postgres://u:pw@db/s -cluster.secret hunter2
    mnemosyned -postgres.address=… -cluster.secret …

- These are hidden: the values of flags that are declared secret (config/flags.py), as `-flag=value` and as
  `-flag value`; the user and the password in a URL; the token after `cluster whois`.
- A secret flag without its value hides the next argument, whatever it is. To hide too much does no harm.
- The secret is visible for the milliseconds before the replacement. Shell history and process accounting
  keep it; a file is better.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Final

from setproctitle import getproctitle, setproctitle, setthreadtitle

PROGRAM: Final = "mnemosyned"
_HIDDEN: Final = "…"
# The environment is in memory after the arguments. The library would overwrite both to make room for a long
# title. With this variable it leaves the environment alone, so that /proc/PID/environ stays readable.
_ARGUMENTS_ONLY: Final = "SPT_NOENV"


def hide_secrets(arguments: Sequence[str], secret_flags: Collection[str]) -> None:
    """Replace the process title by one without secrets, if these arguments hold any.

    If that does not work, a line on the standard error says so, since the user believes the secret hidden.
    `secret_flags` are names without dashes.
    """
    shown = without_secrets(arguments, secret_flags)
    if shown == list(arguments):
        return
    # Arguments that are not UTF-8 hold surrogates, which cannot be encoded.
    title = " ".join([PROGRAM, *shown]).encode(errors="replace").decode()
    show(title)
    if not title.startswith(getproctitle() or "?"):
        sys.stderr.write(f"{PROGRAM}: every user here can read the command line: give secrets in a file\n")


def show(title: str) -> None:
    """Replace the process title, as far as there is room for another one."""
    is_ours = _ARGUMENTS_ONLY not in os.environ
    os.environ.setdefault(_ARGUMENTS_ONLY, "1")
    setproctitle(title)
    if is_ours:
        del os.environ[_ARGUMENTS_ONLY]
    # The library also sets the thread's name, cut to 15 bytes of the title. `ps -C` and `pkill` compare that
    # name, and find the daemon only by its bare name.
    setthreadtitle(PROGRAM)


def without_secrets(arguments: Sequence[str], secret_flags: Collection[str]) -> list[str]:
    """Return the arguments with a mark in place of each secret, each credential in a URL, and each token."""
    if list(arguments[:1]) == ["cluster"] and "whois" in arguments:
        # The token may be anywhere after the word, among flags: everything after it is hidden.
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
            # In any argument: a DSN may be given for the wrong flag, or without one.
            shown.append(re.sub("://.*@", f"://{_HIDDEN}@", argument, flags=re.DOTALL))
        is_secret = is_flag and not equals and not is_secret
    return shown
