"""Rows that were put into PostgreSQL by hand: a damaged bag is one session's loss, and overrides nothing."""

from __future__ import annotations

import asyncio
import itertools
from typing import Final

import asyncpg
import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import (
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon
from redteam.lab import Lab, Void, attack, code_of, require, start
from secrecy import CANARY

_KIND: Final = "row"
_FORGED: Final = "ADMIN"
_SUBJECT: Final = "of-a-row"
_BAG: Final = Session(bag={"k": CANARY}).SerializeToString()
_GOB: Final = bytes.fromhex("127f0401010342616701ff8000010c010c0000")


def _extra(**fields: object) -> bytes:
    return _BAG + Session(**fields).SerializeToString()  # type: ignore[arg-type]  # a Session's fields


# Each is no bag, so that Get is DATA_LOSS.
_BAGS: Final[dict[str, bytes]] = {
    "another subject": _extra(subject_id=_FORGED),
    "another subject first": Session(subject_id=_FORGED).SerializeToString() + _BAG,
    "another subject between entries": _BAG + Session(subject_id=_FORGED).SerializeToString() + _BAG,
    "another client": _extra(subject_client=_FORGED),
    "another token": _extra(access_token=_FORGED * 16),
    "another refresh token": _extra(refresh_token=_FORGED),
    "another expiry": _extra(expire_at=Timestamp(seconds=4_000_000_000)),
    "all fields": _extra(subject_id=_FORGED, subject_client=_FORGED, access_token=_FORGED),
    "a subject with the number in three bytes": _BAG + b"\x92\x80\x00\x05ADMIN",
    "an unknown field": _BAG + b"\x7a\x05ADMIN",
    "an unknown field of 0": _BAG + b"\x78\x00",
    "a group": _BAG + b"\x13\x12\x05ADMIN\x14",
    "a bag of another wire type": b"\x20\x01",
    "a truncated entry": _BAG[:-3],
    "an entry longer than the row": b"\x22\xff\xff\xff\x7f" + _BAG,
    "an entry with a third field": b"\x22\x0c\x0a\x01k\x12\x01v\x1a\x04evil",
    "an entry that is no UTF-8": b"\x22\x06\x0a\x01\xff\x12\x01\xff",
    "an endless number": b"\x22" + b"\xff" * 20,
    "number 0": b"\x02\x05ADMIN",
    "noise": bytes(range(1, 200)),
    "zeros": bytes(100),
    "a bag over the limit": Session(bag={"k": "x" * 5_000_000}).SerializeToString(),
    "half a gob": _GOB[:-5],
    "a gob with noise": _GOB + b"\xff\xff\xff\xff",
    "text": b"{}",
}


async def _insert(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    rows = [(name.encode(), _SUBJECT, bag) for name, bag in _BAGS.items()]
    await connection.executemany(
        "INSERT INTO mnemosyne.session"
        " (access_token, refresh_token, subject_id, subject_client, bag, expire_at)"
        " VALUES ($1, '', $2, '', $3, now() + interval '1 hour')",
        rows,
    )
    await connection.close()


def _found(stub: SessionManagerStub, token: str) -> dict[str, str]:
    """Return what each call says of a row: a status, or a text of what is wrong."""
    found: dict[str, str] = {}
    calls = {
        "Get": lambda: stub.Get(GetRequest(access_token=token), timeout=5).session,
        "Get again": lambda: stub.Get(GetRequest(access_token=token), timeout=5).session,
        "Context": lambda: stub.Context(Empty(), metadata=(("authorization", token),), timeout=5).session,
        "SetValue": lambda: stub.SetValue(SetValueRequest(access_token=token, key="a", value="b"), timeout=5),
    }
    for name, call in calls.items():
        try:
            found[name] = "ADMIN" if _FORGED in str(call()) else "OK"
        except grpc.RpcError as error:
            found[name] = code_of(error).name
    return found


@attack(_KIND, "bags that are none, or say more than a bag", quick_on=("h2",))
def _bags(lab: Lab) -> None:
    daemon = lab.node(storage="postgres")
    with daemon.stub() as stub:
        whole = [start(stub, subject=f"whole-{number}") for number in range(3)]
    asyncio.run(_insert(lab.dsn))
    wrong: dict[str, dict[str, str]] = {}
    with daemon.stub() as stub:
        for name in _BAGS:
            found = _found(stub, name)
            if set(found.values()) != {"DATA_LOSS"}:
                wrong[name] = found
            require(stub.Exists(ExistsRequest(access_token=name), timeout=5).value, f"{name}: no row")
        forged = [name for name, found in wrong.items() if "ADMIN" in found.values()]
        require(not forged, f"rows override what the answer says: {forged}")
        _check_list(daemon, whole)
        require(not wrong, f"not DATA_LOSS: {dict(itertools.islice(wrong.items(), 4))}, of {len(wrong)}")
        # What is damaged can be removed.
        stub.Delete(DeleteRequest(subject_id=_SUBJECT), timeout=5)


def _check_list(daemon: Daemon, whole: list[str]) -> None:
    with daemon.stub() as stub:
        try:
            page = stub.List(ListRequest(limit=100), timeout=5)
        except grpc.RpcError as error:
            require(False, f"one damaged row makes List fail: {code_of(error).name}")
            return
    if not page.sessions:
        raise Void("List shows nothing")
    require(_FORGED not in str(page), "rows override what List says")
    missing = set(whole) - {one.access_token for one in page.sessions}
    require(not missing, f"List leaves out {len(missing)} sessions that are whole")
    require(
        not {one.access_token for one in page.sessions} & _BAGS.keys(),
        "List shows sessions with damaged bags",
    )
