"""argv to exit code.

0 after a clean stop, 1 for a failed start, 2 for wrong flags, 130 for a second Ctrl-C.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from mnemosyned import __version__, settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.config.help import actions_in
from mnemosyned.security.process_title import hide_secrets
from mnemosyned.settings import SECRET_FLAGS, RunConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config


def main() -> int:
    """Run the daemon as the command line, the environment and the file say; or another command."""
    arguments = sys.argv[1:]
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

    actions = actions_in(arguments)
    if actions:
        sys.stdout.write(help_text() if "help" in actions else f"mnemosyned {__version__}\n")
        return 0
    try:
        config = settings.parse(arguments, os.environ)
    except ConfigError as exc:
        return _complain(str(exc), 2)
    if config[RunConfig].only_checks:
        return _check(config)
    return _run(config)


def _check(config: Config) -> int:
    from mnemosyned import configured_files

    try:
        warnings = configured_files.check(config)
    except ConfigError as exc:
        return _complain(str(exc), 2)
    sys.stderr.write("".join(f"mnemosyned: warning: {text}\n" for text in warnings))
    sys.stdout.write("the configuration is valid\n")
    return 0


def _run(config: Config) -> int:
    # The imports make no garbage; the daemon turns the collector on again.
    gc.disable()
    from mnemosyned.daemon import StartFailed, run
    from mnemosyned.observe import logs
    from mnemosyned.observe.config import ObserveConfig
    from mnemosyned.security import core_dumps

    observe = config[ObserveConfig]
    logs.configure(observe.log_environment, observe.log_level, secret_flags=SECRET_FLAGS)
    if not config[RunConfig].has_core_dumps:
        core_dumps.forbid()
    try:
        run(config)
    except StartFailed as exc:
        return _complain(str(exc), 1)
    except KeyboardInterrupt:
        return _complain("stopped before everything was written and closed cleanly", 130)
    return 0


def _complain(text: str, exit_code: int) -> int:
    sys.stderr.write(f"mnemosyned: {text}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
