"""What zttp lacks: each test fails when a release of it closes the gap, and says what may then be deleted.

They speak to zttp itself. The table at the top of http2/core.py says what we do about each gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import zttp
from raw_http2 import (
    ACK,
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HAS_PRIORITY,
    HEADERS,
    MAGIC,
    PREFACE,
    PRIORITY,
    REFUSED_STREAM,
    REQUEST_BLOCK,
    SETTINGS,
    block,
    frame,
    frames_of,
    open_request,
    ping,
    request,
    resets_of,
    rst_stream,
    settings,
    window_update,
)

from http2.core import MAX_STREAMS, RETIRE_AFTER_STREAMS

Core = zttp.H2Connection
RESETS = 256
STREAMS = 4096


def events(core: Core, chunk: bytes) -> list[object]:
    core.receive_data(chunk)
    found: list[object] = []
    while (event := core.next_event()) is not zttp.NEED_DATA:
        found.append(event)
    return found


def is_refused(core: Core, chunk: bytes) -> bool:
    """Whether the bytes end the connection."""
    try:
        events(core, chunk)
    except zttp.RemoteProtocolError:
        return True
    return False


@pytest.fixture
def core() -> Core:
    """A server that has the client's preface."""
    core = zttp.Connection(zttp.SERVER, zttp.HTTP2)
    core.initiate_connection()
    events(core, PREFACE)
    core.data_to_send()
    return core


def stream_ids(count: int) -> Iterator[int]:
    return iter(range(1, 2 * count, 2))


def rounds_until_it_ends(core: Core, chunk_of: Callable[[int], bytes], count: int) -> int:
    """How many streams' chunks the connection takes before it calls them a flood."""
    for at, stream_id in enumerate(stream_ids(count)):
        if is_refused(core, chunk_of(stream_id)):
            return at
    return count


def test_a_connection_ends_after_4096_streams(core: Core) -> None:
    for stream_id in stream_ids(STREAMS):
        events(core, request(stream_id))
        core.stream(stream_id).send_response(200, [], True)
        core.data_to_send()

    assert is_refused(core, request(2 * STREAMS + 1)), "no limit of streams: delete RETIRE_AFTER_STREAMS"
    assert RETIRE_AFTER_STREAMS + MAX_STREAMS < STREAMS


def test_a_connection_ends_after_256_resets_by_the_client(core: Core) -> None:
    ended_after = rounds_until_it_ends(core, lambda it: request(it) + rst_stream(it), 2 * RESETS)

    assert ended_after == RESETS, (
        "another limit of RST_STREAM: if there is none, delete `cancel` in http2/core.py, `resets` and"
        " `reset_at` in http2/frames.py, and `_take_reset` in http2/server.py"
    )


def test_a_connection_ends_after_256_malformed_requests(core: Core) -> None:
    malformed = REQUEST_BLOCK + block([(b"Upper", b"case")])

    ended_after = rounds_until_it_ends(core, lambda it: request(it, headers=malformed), 2 * RESETS)

    assert ended_after == RESETS, "another limit of malformed requests: correct the table in http2/core.py"


def test_a_client_ends_after_256_resets_by_its_server() -> None:
    core = zttp.Connection(zttp.CLIENT, zttp.HTTP2)
    core.initiate_connection()
    events(core, settings())

    def answer(stream_id: int) -> bytes:
        core.send_request(b"POST", b"/", b"2", [(b"host", b"localhost")])
        core.data_to_send()
        return rst_stream(stream_id)

    ended_after = rounds_until_it_ends(core, answer, 2 * RESETS)

    assert ended_after == RESETS, "another limit for a client: if there is none, it may see RST_STREAM again"


def test_the_129th_stream_at_once_is_refused(core: Core) -> None:
    opened = b"".join(open_request(stream_id) for stream_id in stream_ids(MAX_STREAMS))
    events(core, opened)
    assert resets_of(core.data_to_send()) == []

    events(core, open_request(2 * MAX_STREAMS + 1))

    assert resets_of(core.data_to_send()) == [(2 * MAX_STREAMS + 1, REFUSED_STREAM)], (
        "more streams at once: raise MAX_STREAMS, and delete http2/admission.py if the limit can be set"
    )


def test_the_first_settings_of_a_server_cannot_be_set() -> None:
    with pytest.raises(TypeError):
        zttp.Connection(zttp.SERVER, zttp.HTTP2, settings={})  # type: ignore[call-overload]  # the gap
    assert not hasattr(zttp.H2Connection, "settings"), "delete `_settings_frame` in http2/core.py"


@pytest.mark.parametrize(
    "flood",
    [
        ping(),
        settings(),
        frame(PRIORITY, 0, 3, b"\0\0\0\0\x10"),
        window_update(0, 1),
        frame(0x63, 0, 0),
        frame(DATA, 0, 1),
    ],
    ids=["PING", "SETTINGS", "PRIORITY", "WINDOW_UPDATE", "unknown", "empty DATA"],
)
def test_frames_without_use_are_not_bounded(core: Core, flood: bytes) -> None:
    events(core, open_request(1))

    for _ in range(200):
        assert not is_refused(core, flood * 100), "a bound: see whether http2/purse.py can be deleted"
        core.data_to_send()


def test_bodies_without_a_window_are_kept_without_a_bound(core: Core) -> None:
    events(core, request(1))
    sender = core.stream(1)
    sender.send_response(200, [])

    for _ in range(40):
        sender.send_data(bytes(1024**2))

    assert (sender.pending_bytes or 0) > 39 * 1024**2, (
        "bodies are bounded: see what http2/outbox.py must still do"
    )


def test_priority_of_stream_0_is_accepted(core: Core) -> None:
    of_no_stream = frame(PRIORITY, 0, 0, b"\0\0\0\3\x10")

    assert not is_refused(core, of_no_stream), "it is refused: delete `_check_priority` in http2/frames.py"


@pytest.mark.parametrize(
    "dependent",
    [
        frame(PRIORITY, 0, 1, b"\0\0\0\1\x10"),
        frame(HEADERS, END_HEADERS | END_STREAM | HAS_PRIORITY, 1, b"\0\0\0\1\x10" + REQUEST_BLOCK),
    ],
    ids=["PRIORITY", "HEADERS"],
)
def test_streams_that_depend_on_themselves_are_accepted(core: Core, dependent: bytes) -> None:
    try:
        events(core, dependent)
    except zttp.RemoteProtocolError:
        pytest.fail("they are refused: delete `_check_dependency` in http2/frames.py")
    assert resets_of(core.data_to_send()) == [], (
        "they are reset: delete `_check_dependency` in http2/frames.py"
    )


def test_trailers_of_a_stream_that_was_reset_end_the_connection(core: Core) -> None:
    events(core, open_request(1))
    core.stream(1).reset(CANCEL)

    trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, block([(b"a", b"b")]))

    assert is_refused(core, trailers), "they are ignored: delete the row in the table in http2/core.py"


def test_an_acknowledgement_is_taken_for_the_first_settings() -> None:
    core = zttp.Connection(zttp.SERVER, zttp.HTTP2)
    core.initiate_connection()

    assert not is_refused(core, MAGIC + frame(SETTINGS, ACK, 0)), "refused: delete the row in http2/core.py"


def test_a_client_says_https_on_a_plain_connection() -> None:
    core = zttp.Connection(zttp.CLIENT, zttp.HTTP2)
    core.initiate_connection()
    core.data_to_send()

    core.send_request(b"POST", b"/", b"2", [(b"host", b"localhost")])

    [headers] = frames_of(core.data_to_send())
    assert b"https" in headers.payload, "the scheme can be told: tell it, and delete the row in http2/core.py"


def test_windows_that_sum_to_too_much_are_refused(core: Core) -> None:
    """No gap any more; here because earlier releases had it."""
    events(core, open_request(1))
    events(core, window_update(1, 2**30))

    events(core, window_update(1, 2**30))

    assert [stream_id for stream_id, _ in resets_of(core.data_to_send())] == [1]
    events(core, window_update(0, 2**30))
    assert is_refused(core, window_update(0, 2**30))
