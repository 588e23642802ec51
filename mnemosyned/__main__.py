"""argv to exit code.

0 after a clean stop, 1 for a failed start, 2 for wrong flags, 130 for a second Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from mnemosyned.security.process_title import hide_secrets


def main() -> int:
    """Run the daemon as the command line, the environment and the file say; or another command."""
    hide_secrets(sys.argv[1:])
    # Only now: they take ten times as long as all before, while everybody could read the secrets.
    from mnemosyned.commands import cluster as cli  # noqa: PLC0415
    from mnemosyned.commands import migrate  # noqa: PLC0415
    from mnemosyned.config import config as configuration  # noqa: PLC0415
    from mnemosyned.daemon import StartFailed, run  # noqa: PLC0415
    from mnemosyned.observe import logs  # noqa: PLC0415

    if sys.argv[1:2] == ["cluster"]:
        return cli.main(sys.argv[2:])
    if sys.argv[1:2] == ["key"]:
        return cli.make_key(sys.argv[2:])
    if sys.argv[1:2] == ["migrate"]:
        return migrate.main(sys.argv[2:])
    try:
        config = configuration.parse(sys.argv[1:], os.environ)
    except configuration.ConfigError as exc:
        return _complain(str(exc), 2)
    if config.check_config:
        sys.stdout.write("the configuration is valid\n")
        return 0
    logs.configure(config.log_environment, config.log_level)
    try:
        run(config)
    except StartFailed as exc:
        return _complain(str(exc), 1)
    except KeyboardInterrupt:
        return _complain("stopped before everything was in order", 130)
    return 0


def _complain(text: str, exit_code: int) -> int:
    sys.stderr.write(f"mnemosyned: {text}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
