"""What all commands on a storage do with their arguments and with signals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator

import pytest
from serving import configured

from mnemosyned.commands import on_storage
from mnemosyned.config.config import Config


@pytest.fixture(params=["in a terminal", "in the background"])
def sigint(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether SIGINT is ignored, as a shell does for `command &` in a script."""
    is_ignored = request.param == "in the background"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.default_int_handler)
    yield request.param
    signal.signal(signal.SIGINT, before)


def run(body: Callable[[Config], int]) -> int:
    return on_storage.command((), "help", lambda _: configured("-storage=memory"), body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["before the loop", "in the loop"])
@pytest.mark.usefixtures("sigint")
def test_a_signal_interrupts_a_command_and_everything_is_closed(number: signal.Signals, place: str) -> None:
    handler = signal.getsignal(number)
    closed = []

    async def work() -> None:
        try:
            signal.raise_signal(number)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    def body(_: Config) -> int:
        if place == "in the loop":
            asyncio.run(work())
        signal.raise_signal(number)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        run(body)
    assert closed == ([True] if place == "in the loop" else [])
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)

    def body(_: Config) -> int:
        signal.raise_signal(number)
        assert number not in on_storage.interrupting()
        return 7

    try:
        assert run(body) == 7
    finally:
        signal.signal(number, before)
