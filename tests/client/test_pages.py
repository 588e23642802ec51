"""The client that goes through all pages of List."""

from __future__ import annotations

import grpc
import pytest
from mnemosynerpc.pages import pages, sessions
from mnemosynerpc.session_pb2 import ListRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon


def test_all_sessions_come_once_by_token_and_a_failed_walk_goes_on() -> None:
    with Daemon("-storage=memory") as daemon, grpc.insecure_channel(daemon.serving().address) as channel:
        stub = SessionManagerStub(channel)
        assert list(sessions(stub, ListRequest())) == []
        tokens = [f"t{number:03}" for number in range(25)]
        for token in reversed(tokens):
            stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")), timeout=5)

        assert [one.access_token for one in sessions(stub, ListRequest(limit=4))] == tokens

        request = ListRequest(limit=10)
        next(walk := pages(stub, request))
        next(walk)
        request.limit = 5000
        with pytest.raises(grpc.RpcError):
            next(walk)
        request.limit = 10
        assert [one.access_token for one in sessions(stub, request)] == tokens[20:]
