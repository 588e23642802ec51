from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mnemosyned.observe.line_writer import MAX_QUEUED_BYTES, LineWriter

TIMEOUT_S = 10


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with suppress(OSError):  # a test may have closed it
            os.close(descriptor)


def dropped_line(count: int, reason: str) -> str:
    return f"{count} dropped: {reason}\n"


def read_to_the_end(descriptor: int) -> list[str]:
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        return stream.read().decode().splitlines()


def test_lines_are_written_in_their_sequence(pipe: tuple[int, int]) -> None:
    reader, descriptor = pipe
    writer = LineWriter(descriptor)
    for number in range(1000):
        writer.put(f"{number}\n")

    assert writer.close(timeout_s=TIMEOUT_S)
    os.close(descriptor)
    assert read_to_the_end(reader) == [str(number) for number in range(1000)]


def test_a_reader_that_does_not_read_holds_nobody_and_learns_what_is_missing(pipe: tuple[int, int]) -> None:
    reader, descriptor = pipe
    writer = LineWriter(descriptor, render_dropped=dropped_line)
    line = "x" * 999 + "\n"
    count = 2 * MAX_QUEUED_BYTES // len(line)
    for _ in range(count):
        writer.put(line)
    dropped = writer.dropped
    held = not writer.close(timeout_s=0.05)

    assert held
    assert count / 3 < dropped < count
    with os.fdopen(os.dup(reader), "rb") as stream:
        lines = []
        while sum(one == line for one in lines) < count - dropped:
            lines.append(stream.readline().decode())
    told = [one for one in lines if one != line]
    # In one line, or in two: the first line may have been taken while others were dropped.
    assert sum(int(one.split()[0]) for one in told) == dropped
    assert all("the reader of the log is too slow" in one for one in told)


def test_a_line_too_long_for_the_pipe_is_written_whole_to_a_non_blocking_one(pipe: tuple[int, int]) -> None:
    reader, descriptor = pipe
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK)
    writer = LineWriter(descriptor)
    long = "x" * 200_000 + "\n"
    writer.put(long)
    with os.fdopen(os.dup(reader), "rb") as stream:
        assert stream.readline().decode() == long
    assert writer.close(timeout_s=TIMEOUT_S)
    assert writer.dropped == 0


def test_what_the_system_refuses_is_counted_and_the_next_line_is_tried() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    reader, descriptor = os.pipe()
    os.close(reader)
    writer = LineWriter(descriptor, render_dropped=dropped_line)
    for _ in range(5):
        writer.put("lost\n")
    reader_again, pipe_again = os.pipe()

    assert writer.close(timeout_s=TIMEOUT_S)
    assert writer.dropped == 5
    for one in (descriptor, reader_again, pipe_again):
        os.close(one)


def test_a_disk_that_has_space_again_gets_the_count_of_lost_lines() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    reader, descriptor = os.pipe()
    writer = LineWriter(full, render_dropped=dropped_line)
    for _ in range(3):
        writer.put("lost\n")
    while writer.dropped < 3:
        os.sched_yield()
    os.dup2(descriptor, full)
    writer.put("written\n")

    assert writer.close(timeout_s=TIMEOUT_S)
    for one in (descriptor, full):
        os.close(one)
    assert read_to_the_end(reader) == ["3 dropped: No space left on device", "written"]
    os.close(reader)


def test_a_line_after_the_end_is_counted_as_lost(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    writer.close(timeout_s=TIMEOUT_S)
    writer.put("late\n")

    assert writer.dropped == 1
