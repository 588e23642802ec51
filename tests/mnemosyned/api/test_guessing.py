"""Which answers count as guesses, of whom, and what becomes of them beyond the limit."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import Int64Value
from mnemosynerpc.session_pb2 import DeleteRequest, ListRequest

from aio.deadline import NO_DEADLINE, Deadline
from aio.later import Later
from mnemosyned.api.auth import KEY_METADATA
from mnemosyned.api.guessing import DELAY_S, GuessWatch
from mnemosyned.api.session_manager import RPCS, SERVICE_NAME
from mnemosyned.errors import (
    CorruptSession,
    InvalidArgument,
    MessageTooLarge,
    MnemosyneError,
    PermissionDenied,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
    Unauthenticated,
)
from mnemosyned.security.api_keys import Callers, Role
from mnemosyned.security.config import GuessConfig
from mnemosyned.transport.call import Encoded, await_in_time
from mnemosyned.transport.methods import MethodTable, UnaryHandler, UnaryMethod

METHODS = [*RPCS, "Create", "SetData", "Context"]
NONE, SOME = b"", b"\x08\x01"


class Known(Callers):
    """Callers of which the third line of the file has every key but one."""

    def line_of(self, key: str) -> int | None:
        return None if key == "removed" else 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeCall:
    owner: str | None = None
    peer: str = "192.0.2.1:5000"
    deadline: Deadline = NO_DEADLINE
    certificate_names: tuple[str, ...] = ()
    key: str | None = None

    def metadata(self, key: str) -> str | None:
        return self.key if key == KEY_METADATA else None


HOWS = ("at once", "waits", "forwarded", "forwarded, then waits")


@dataclass
class Watched:
    """One method of the table, and a watch around it."""

    threshold: int = 3
    limit: int = 0
    callers: Callable[[], Callers] | None = None
    max_streams: int = 128
    name: str = "Get"
    now_s: float = 1000.0
    answer: Encoded | MnemosyneError = field(default_factory=SessionNotFound)

    def __post_init__(self) -> None:
        config = GuessConfig(threshold=self.threshold, window_s=60.0, limit=self.limit)
        self.watch = GuessWatch(config, self.callers, max_streams=self.max_streams, now_s=lambda: self.now_s)
        table = MethodTable()
        table.add_unary(SERVICE_NAME, self.name, self._at_once, max_message_bytes=7)
        table.add_unary("grpc.health.v1.Health", "Check", self._at_once)
        self.health = table.unary["/grpc.health.v1.Health/Check"].handle
        self.watch.watch(table)
        self.method = table.unary[f"/{SERVICE_NAME}/{self.name}"]
        # The same, for an answer that waits, and for those of another node.
        self.later = self._watched(self._later)
        self.methods = {
            "at once": self.method,
            "waits": self.later,
            "forwarded": self._watched(self._forwarded),
            "forwarded, then waits": self._watched(self._forwarded_in_vain),
        }

    def _watched(self, handle: UnaryHandler) -> UnaryMethod:
        table = MethodTable()
        table.add_unary(SERVICE_NAME, self.name, handle)
        self.watch.watch(table)
        return table.unary[f"/{SERVICE_NAME}/{self.name}"]

    def _at_once(self, _message: bytes, _call: Any) -> Encoded:  # noqa: ANN401  # of no interest
        if isinstance(self.answer, MnemosyneError):
            raise self.answer
        return self.answer

    async def _later(self, message: bytes, call: Any) -> Encoded:  # noqa: ANN401  # of no interest
        await asyncio.sleep(0)
        return self._at_once(message, call)

    def _forwarded(self, message: bytes, call: Any) -> Later[Encoded]:  # noqa: ANN401  # of no interest
        answer: Later[None] = Later()
        asyncio.get_running_loop().call_soon(answer.set_result, None)
        return answer.through(lambda _: self._at_once(message, call))

    def _forwarded_in_vain(self, message: bytes, call: Any) -> Later[Encoded]:  # noqa: ANN401  # of no interest
        answer: Later[None] = Later()
        asyncio.get_running_loop().call_soon(answer.set_result, None)
        return answer.through(lambda _: self._later(message, call))

    async def ask(
        self, call: FakeCall | None = None, message: bytes = b"", *, how: str = "at once"
    ) -> Encoded:
        found = self.methods[how].handle(message, call or FakeCall())
        return found if isinstance(found, bytes | tuple) else await found

    async def guess(self, times: int, call: FakeCall | None = None) -> None:
        for _ in range(times):
            with pytest.raises(SessionNotFound):
                await self.ask(call)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.msg == "caller_guesses"]


@pytest.fixture(autouse=True)
def warnings_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("name", "request_", "answer", "counts"),
    [
        *[
            (name, b"", SessionNotFound(), True)
            for name in METHODS
            if name not in {"Exists", "List", "Delete"}
        ],
        ("Start", b"", SessionAlreadyExists(), True),
        ("Create", b"", SessionAlreadyExists(), True),
        ("Start", b"", SOME, False),
        ("Get", b"", SOME, False),
        ("Get", b"", (b"so", b"me"), False),
        ("Get", b"", NONE, False),
        ("Exists", b"", NONE, True),
        ("Exists", b"", SOME, False),
        ("Delete", DeleteRequest(access_token="t").SerializeToString(), NONE, True),
        ("Delete", DeleteRequest(refresh_token="t").SerializeToString(), NONE, True),
        ("Delete", DeleteRequest(subject_id="s").SerializeToString(), NONE, False),
        ("Delete", DeleteRequest(access_token="t").SerializeToString(), SOME, False),
        ("List", ListRequest(query={"refresh_token": "t"}).SerializeToString(), NONE, True),
        ("List", ListRequest(query={"refresh_token": "t"}).SerializeToString(), SOME, False),
        ("List", ListRequest().SerializeToString(), NONE, False),
        *[
            ("Get", b"", error, False)
            for error in (InvalidArgument(), PermissionDenied(), CorruptSession(), StorageUnavailable())
        ],
    ],
)
async def test_an_answer_counts_if_it_tells_about_a_token(
    name: str, request_: bytes, answer: Encoded | MnemosyneError, *, how: str, counts: bool
) -> None:
    watched = Watched(name=name, answer=answer)
    if isinstance(answer, MnemosyneError):
        with pytest.raises(type(answer)) as caught:
            await watched.ask(message=request_, how=how)
        assert caught.value is answer
    else:
        assert await watched.ask(message=request_, how=how) == answer

    assert (watched.watch.counts.tokens, watched.watch.counts.keys) == (int(counts), 0)
    assert watched.watch.callers() == int(counts)
    assert watched.method.max_message_bytes == 7


def test_nothing_deleted_is_an_empty_message() -> None:
    assert Int64Value(value=0).SerializeToString() == NONE


async def test_other_services_are_not_watched() -> None:
    watched = Watched()
    with pytest.raises(SessionNotFound):
        watched.health(b"", FakeCall())

    assert watched.watch.counts.tokens == 0


async def test_a_key_that_is_unknown_counts_and_one_that_is_missing_does_not() -> None:
    watched = Watched(answer=Unauthenticated(), callers=lambda: Known(role_by_digest={}, role_by_name={}))
    for key in ("guessed", "", None):
        with pytest.raises(Unauthenticated):
            await watched.ask(FakeCall(key=key))

    assert (watched.watch.counts.keys, watched.watch.counts.tokens) == (2, 0)


async def test_a_caller_over_the_threshold_is_logged_once_in_a_window(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched(threshold=3)
    await watched.guess(3)
    assert lines(caplog) == []

    await watched.guess(50)
    (line,) = lines(caplog)
    assert (line["caller"], line["caller_kind"]) == ("192.0.2.1", "address")
    assert (line["unknown"], line["within_s"], line["levelname"]) == (4, 60.0, "WARNING")
    watched.now_s += 60
    await watched.guess(1)

    assert len(lines(caplog)) == 2
    assert watched.watch.counts.exceeded_by_kind == {"key": 0, "certificate": 0, "address": 2}


async def test_ports_and_ipv6_addresses_of_a_network_are_one_caller(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(threshold=3)
    for number in range(4):
        await watched.guess(1, FakeCall(peer=f"[2001:db8::{number}]:{5000 + number}"))
    await watched.guess(3, FakeCall(peer="[2001:db8:0:1::1]:5000"))

    assert [line["caller"] for line in lines(caplog)] == ["2001:db8::/64"]


async def test_a_key_that_was_checked_is_the_caller_wherever_it_comes_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched(threshold=3, callers=lambda: Known(role_by_digest={}, role_by_name={}))
    for number in range(4):
        call = FakeCall(
            peer=f"192.0.2.{number}:5000", key="a-known-key", certificate_names=("a", f"b{number}")
        )
        await watched.guess(1, call)
    await watched.guess(3, FakeCall(key="another-key"))

    assert [(line["caller"], line["caller_kind"]) for line in lines(caplog)] == [
        ("line 3 of -auth.keys", "key")
    ]
    assert "a-known-key" not in str(lines(caplog))
    assert watched.watch.counts.exceeded_by_kind["key"] == 1


async def test_a_key_that_was_removed_meanwhile_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(threshold=1, callers=lambda: Known(role_by_digest={}, role_by_name={}))
    await watched.guess(2, FakeCall(key="removed"))

    assert [line["caller"] for line in lines(caplog)] == ["a key that -auth.keys has no more"]


async def test_a_key_that_is_not_checked_names_no_caller(caplog: pytest.LogCaptureFixture) -> None:
    unguarded = Watched(threshold=3)
    refused = Watched(
        threshold=3, answer=Unauthenticated(), callers=lambda: Known(role_by_digest={}, role_by_name={})
    )
    for number in range(4):
        await unguarded.guess(1, FakeCall(key=f"key {number}"))
        with pytest.raises(Unauthenticated):
            await refused.ask(FakeCall(key=f"key {number}"))

    assert [line["caller_kind"] for line in lines(caplog)] == ["address", "address"]


async def test_without_a_key_the_first_name_of_the_certificate_is_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for callers in (None, lambda: Known(role_by_digest={}, role_by_name={"*.example": Role.ADMIN})):
        watched = Watched(threshold=3, callers=callers)
        for number in range(4):
            call = FakeCall(peer=f"192.0.2.{number}:1", certificate_names=("web.example", f"{number}"))
            await watched.guess(1, call)

    assert [line["caller"] for line in lines(caplog)] == ["web.example"] * 2


async def test_lines_are_limited_though_each_caller_is_due_for_one(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(threshold=1)
    for number in range(150):
        await watched.guess(2, FakeCall(peer=f"192.0.2.{number}:1"))
    watched.now_s += 1
    await watched.guess(2, FakeCall(peer="198.51.100.1:1"))

    assert len(lines(caplog)) == 101
    assert lines(caplog)[-1]["left_out"] == 50
    assert watched.watch.counts.exceeded_by_kind["address"] == 151


async def test_over_the_limit_the_answer_comes_late_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []

    async def sleep(seconds: float) -> None:
        slept_s.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    watched = Watched(limit=3, threshold=1000)
    await watched.guess(3)
    assert slept_s == []

    await watched.guess(1)
    assert slept_s == [DELAY_S]
    await watched.guess(1, FakeCall(deadline=Deadline.in_s(0.2)))
    assert 0 < slept_s[1] <= 0.1
    watched.answer = SOME
    assert await watched.ask() == SOME
    assert len(slept_s) == 2

    assert (watched.watch.counts.late, watched.watch.counts.refused) == (2, 0)


@pytest.mark.parametrize("how", HOWS)
async def test_a_no_of_exists_comes_late_too(*, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(limit=1, name="Exists", answer=NONE)
    await watched.ask()
    monkeypatch.setattr("mnemosyned.api.guessing.DELAY_S", 0.001)

    assert await watched.ask(how=how) == NONE
    assert watched.watch.counts.late == 1


async def test_a_limit_below_the_threshold_is_logged_when_it_is_passed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched(limit=2, threshold=1000)
    await watched.guess(2)
    waiting = asyncio.create_task(watched.ask())
    await asyncio.sleep(0)
    waiting.cancel()

    assert [line["unknown"] for line in lines(caplog)] == [3]


@pytest.mark.parametrize("how", HOWS)
async def test_few_answers_of_a_caller_wait_and_the_others_are_refused_at_once(*, how: str) -> None:
    watched = Watched(limit=1)
    await watched.guess(1)
    tasks = [asyncio.create_task(watched.ask(how=how)) for _ in range(40)]
    done, waiting = await asyncio.wait(tasks, timeout=0.1)

    assert (len(done), len(waiting)) == (32, 8)
    assert {type(task.exception()) for task in done} == {MessageTooLarge}
    assert {str(task.exception()) for task in done} == {
        "mnemosyned: too many unknown tokens or API keys from this caller; try again later"
    }
    assert (watched.watch.counts.late, watched.watch.counts.refused) == (8, 32)
    # Other callers are neither late nor refused.
    await watched.guess(1, FakeCall(peer="198.51.100.1:1"))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    # The places of the cancelled ones are free.
    again = asyncio.create_task(watched.ask())
    assert not (await asyncio.wait([again], timeout=0.05))[0]
    again.cancel()


async def test_answers_that_wait_are_bounded_over_all_callers() -> None:
    watched = Watched(limit=1)
    tasks = []
    for number in range(20):
        call = FakeCall(peer=f"192.0.2.{number}:1")
        await watched.guess(1, call)
        tasks += [asyncio.create_task(watched.ask(call)) for _ in range(8)]
    done, waiting = await asyncio.wait(tasks, timeout=0.1)

    assert (len(done), len(waiting)) == (160 - 64, 64)
    assert watched.watch.counts.refused == len(done)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_where_a_connection_has_few_places_none_is_taken() -> None:
    watched = Watched(limit=1, max_streams=15)
    await watched.guess(1)

    with pytest.raises(MessageTooLarge):
        await watched.ask()
    assert watched.watch.counts.late == 0


async def test_a_call_whose_time_is_over_leaves_no_coroutine_behind(recwarn: pytest.WarningsRecorder) -> None:
    watched = Watched()
    call = FakeCall(deadline=Deadline.in_s(-1))
    working = watched.later.handle(b"", call)
    assert isinstance(working, Coroutine)
    with pytest.raises(MnemosyneError, match="deadline"):
        await await_in_time(working, call)
    del working
    gc.collect()

    # What other tests have left behind may be collected here too.
    assert [one for one in recwarn if "never awaited" in str(one.message)] == []
    assert watched.watch.counts.tokens == 0


@pytest.mark.parametrize(("name", "kept"), [("SetValue", 0), ("Delete", 1)])
async def test_a_request_is_kept_in_memory_only_if_it_is_needed_later(name: str, kept: int) -> None:
    watched = Watched(name=name, answer=SOME)

    async def work(_message: bytes, _call: Any) -> Encoded:  # noqa: ANN401  # of no interest
        return SOME

    table = MethodTable()
    table.add_unary(SERVICE_NAME, name, lambda _, call: work(b"", call))
    watched.watch.watch(table)
    message = DeleteRequest(subject_id="s" * 1000).SerializeToString()
    before = sys.getrefcount(message)
    working = table.unary[f"/{SERVICE_NAME}/{name}"].handle(message, FakeCall())
    assert isinstance(working, Coroutine)

    assert sys.getrefcount(message) - before == kept
    assert await working == SOME


async def test_the_coroutine_of_a_call_can_be_driven_by_hand() -> None:
    watched = Watched(answer=SOME)
    working = watched.later.handle(b"", FakeCall())
    assert isinstance(working, Coroutine)
    assert working.send(None) is None
    with pytest.raises(ZeroDivisionError):
        working.throw(ZeroDivisionError())
    working.close()

    assert watched.watch.counts.tokens == 0
