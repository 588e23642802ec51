"""What bytes of a client, whatever they are, do to a method: it answers, or refuses with an error of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from mnemosynerpc import session_pb2 as pb
from serving import assembled

from aio.deadline import NO_DEADLINE
from mnemosyned.errors import MnemosyneError
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.status import GRPC_STATUS


class AnyCall:
    """A call without anything but a token in its metadata."""

    peer = "192.0.2.1:1"
    deadline = NO_DEADLINE
    certificate_names = ()
    owner: str | None = None

    def __init__(self, authorization: str) -> None:
        self._authorization = authorization

    def metadata(self, key: str) -> str | None:
        return self._authorization if key == "authorization" else None


class Server:
    """All methods over a store in memory, on a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.table = assembled(MemoryStore()).table

    def answer(self, path: str, message: bytes, call: AnyCall) -> bytes | MnemosyneError:
        async def answered() -> bytes:
            answer: bytes | Coroutine[Any, Any, bytes] = self.table.unary[path].handle(message, call)
            return answer if isinstance(answer, bytes) else await answer

        try:
            return self.loop.run_until_complete(answered())
        except MnemosyneError as exc:
            return exc


SERVER = Server()
TOKENS = st.sampled_from(["", "t", "u", "\0", "x" * 4097]) | st.text(max_size=20)
TEXTS = st.text(max_size=20) | st.just("x" * 2049)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
INSTANTS = st.none() | st.builds(Timestamp, seconds=NUMBERS, nanos=st.integers(-(2**31), 2**31 - 1))
SESSIONS = st.builds(
    pb.Session,
    access_token=TOKENS,
    subject_id=TEXTS,
    subject_client=TEXTS,
    refresh_token=TEXTS,
    bag=st.dictionaries(TEXTS, TEXTS, max_size=3),
    expire_at=INSTANTS,
)
QUERIES = st.builds(pb.Query, expire_at_from=INSTANTS, expire_at_to=INSTANTS, refresh_token=TEXTS)
REQUESTS: st.SearchStrategy[Message] = st.one_of(
    st.builds(pb.StartRequest, session=st.none() | SESSIONS),
    st.builds(pb.GetRequest, access_token=TOKENS),
    st.builds(pb.SetValueRequest, access_token=TOKENS, key=TEXTS, value=TEXTS),
    st.builds(pb.ListRequest, offset=NUMBERS, limit=NUMBERS | st.integers(0, 5), query=st.none() | QUERIES),
    st.builds(
        pb.DeleteRequest,
        access_token=TOKENS,
        expire_at_from=INSTANTS,
        expire_at_to=INSTANTS,
        refresh_token=TEXTS,
        subject_id=TEXTS,
    ),
)
MESSAGES = st.binary(max_size=60) | REQUESTS.map(lambda request: request.SerializeToString())


@pytest.mark.fuzz
@given(st.sampled_from(sorted(SERVER.table.unary)), MESSAGES, TOKENS)
def test_no_bytes_do_worse_than_be_refused(path: str, message: bytes, authorization: str) -> None:
    answer = SERVER.answer(path, message, AnyCall(authorization))

    assert isinstance(answer, bytes) or (
        type(answer) in GRPC_STATUS and str(answer).startswith("mnemosyned: ")
    )
