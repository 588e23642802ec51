"""Running a command's work on the configured storage, as `migrate` and `export` do. Not a command itself.

    arguments ── command ──> help, complaint, -check-config     that is all
                    └──────> the command's body ── run ──> its work, on the open storage

The work gets the engine's own store, which knows sessions by their stored keys: a command that has tokens
puts a HashedStore in front of it. While it runs, `sys.stderr` is the log: what the work tells people goes to
the standard output, or to the `sys.stderr` of before.

SIGTERM and SIGHUP, as of a terminal that is closed, end a command as Ctrl-C does: a file with tokens that is
not complete is removed, and a private server stopped. A signal that is ignored, as by `nohup`, stays so.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

from mnemosyned import settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.errors import MnemosyneError
from mnemosyned.observe import logs
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.metrics import new_registry
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.engines import StorageConfig, Surroundings, new_store

if TYPE_CHECKING:
    from types import FrameType

    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import FullStore
    from mnemosyned.storage.engines import PrivateServer

_LIKE_CTRL_C: Final = (signal.SIGTERM, signal.SIGHUP)


def command(
    argv: Sequence[str],
    help_text: str,
    parse: Callable[[Sequence[str]], Config],
    body: Callable[[Config], int],
) -> int:
    """Do what the arguments ask for; return the exit code: that of the body, or 2 for wrong flags.

    `parse` raises ConfigError.
    """
    if {"-h", "-help", "--help"} & set(argv):
        sys.stdout.write(help_text)
        return 0
    try:
        config = parse(argv)
    except ConfigError as exc:
        return complain(str(exc), 2)
    if config[settings.RunConfig].only_checks:
        sys.stdout.write("the configuration is valid\n")
        return 0
    with _interruptible():
        return body(config)


def interrupting() -> list[signal.Signals]:
    """Return the signals that interrupt the command: those that its parent does not have it ignore."""
    signals = (signal.SIGINT, *_LIKE_CTRL_C)
    return [one for one in signals if signal.getsignal(one) is not signal.SIG_IGN]


@contextmanager
def _interruptible() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in interrupting() if one in _LIKE_CTRL_C}
    for one in before:
        signal.signal(one, _interrupt)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # That of the event loop, while there is one. In the background of a script, SIGINT is ignored.
    of_ctrl_c = signal.getsignal(signal.SIGINT)
    (of_ctrl_c if callable(of_ctrl_c) else signal.default_int_handler)(number, frame)


def check_durable(config: Config, command: str) -> None:
    """Raise ConfigError if the storage forgets its sessions, so that the command can find none."""
    storage = config[StorageConfig]
    if not storage.engine.capabilities.is_durable:
        raise ConfigError(
            f"{command} needs a storage that keeps sessions, and -storage={storage.name} does not"
        )


def check_movable(config: Config, command: str) -> None:
    """Raise ConfigError if the sessions of the storage cannot be moved: it has not every part of the port."""
    check_durable(config, command)
    storage = config[StorageConfig]
    abilities = storage.engine.capabilities
    if not (abilities.is_shared and abilities.can_rename and abilities.can_check):
        raise ConfigError(f"{command} cannot walk through the sessions of -storage={storage.name}")


def complain(text: str, exit_code: int) -> int:
    """Tell a person what is wrong, in one line; return the exit code."""
    sys.stderr.write(f"mnemosyned: {text}\n")
    return exit_code


def run(config: Config, work: Callable[[FullStore], Coroutine[Any, Any, int]]) -> int:
    """Open the storage and do the work; return its exit code, or 1 if the storage fails."""
    observe = config[ObserveConfig]
    logs.configure(observe.log_environment, observe.log_level, secret_flags=settings.SECRET_FLAGS)
    try:
        return _run_on_server(config, work)
    except (MnemosyneError, StorageRefused) as exc:
        return complain(str(exc).removeprefix("mnemosyned: "), 1)


def _run_on_server(config: Config, work: Callable[[FullStore], Coroutine[Any, Any, int]]) -> int:
    try:
        # If a daemon runs the private server already, this process only shares it.
        server = config[StorageConfig].engine.start_server(config)
        try:
            return asyncio.run(_run(config, server, work))
        finally:
            if server is not None:
                server.stop()
    finally:
        # What failed is told after the lines of the log, and in a line for people.
        logs.close()


async def _run(
    config: Config, server: PrivateServer | None, work: Callable[[FullStore], Coroutine[Any, Any, int]]
) -> int:
    surroundings = Surroundings(registry=new_registry(), server=server)
    # The command has checked that the engine has the parts of the port that it needs.
    store = cast("FullStore", new_store(config, surroundings, None))
    await store.open()
    try:
        return await work(store)
    finally:
        await store.close()
