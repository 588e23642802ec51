"""argv to exit code.

0 after a clean stop, 1 for a failed start or an output that cannot be written, 2 for wrong flags, 130 for a
second Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from mnemosyned import __version__, lean_imports, settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.config.help import actions_in
from mnemosyned.observe import stdio
from mnemosyned.security.process_title import hide_secrets
from mnemosyned.settings import SECRET_FLAGS, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemosyned.config.config import Config


def main() -> int:
    """Run the daemon as the command line, the environment and the file say; or another command."""
    stdio.secure()
    try:
        exit_code = _exit_code_of(sys.argv[1:])
        sys.stdout.flush()
    except stdio.OutputFailed as exc:
        stdio.abandon_output()
        return _complain(str(exc), 1)
    except KeyboardInterrupt:  # before there was a daemon, or while its last lines were waited for
        stdio.abandon_output()
        return 130
    return exit_code


def _exit_code_of(arguments: list[str]) -> int:
    try:
        return _main(arguments)
    except SystemExit as exc:
        # argparse ends a command for help and for wrong usage; what it has printed is still to be flushed.
        return exc.code if isinstance(exc.code, int) else 1


def _main(arguments: list[str]) -> int:
    hide_secrets(arguments, SECRET_FLAGS)
    # Only now: these imports take ten times as long as all before, and until here `ps` shows the secrets.
    from mnemosyned.commands import COMMANDS

    if arguments and arguments[0] in COMMANDS:
        from mnemosyned.security import core_dumps

        # Commands may read secrets and tokens too.
        core_dumps.forbid()
        return COMMANDS[arguments[0]].run(arguments[1:])
    return _serve(arguments)


def _serve(arguments: list[str]) -> int:
    from mnemosyned.commands import help_text  # see above

    def parse() -> Config:
        return settings.parse(arguments, os.environ)

    actions = actions_in(arguments)
    if actions:
        sys.stdout.write(help_text() if "help" in actions else f"mnemosyned {__version__}\n")
        return 0
    try:
        config = parse()
    except ConfigError as exc:
        return _complain(str(exc), 2)
    if config[RunConfig].only_checks:
        return _check(config)
    return _run(config, parse, arguments)


def _check(config: Config) -> int:
    lean_imports.load()
    from mnemosyned import configured_files

    try:
        warnings = configured_files.check(config)
    except ConfigError as exc:
        return _complain(str(exc), 2)
    for text in warnings:
        _complain(f"warning: {text}", 0)
    sys.stdout.write("the configuration is valid\n")
    return 0


def _run(config: Config, parse: Callable[[], Config], arguments: list[str]) -> int:
    lean_imports.load()
    from mnemosyned import running

    def body() -> None:
        if config[RunConfig].workers > 1:
            from mnemosyned.workers import supervisor

            supervisor.run(config, parse, arguments)
            return
        from mnemosyned.daemon import run

        run(config, parse)

    return running.run(config, body)


def _complain(text: str, exit_code: int) -> int:
    sys.stderr.write(f"mnemosyned: {text}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
