"""Python environments of their own for clients, and the calls that every client makes from there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

from secrecy import CANARY

ROOT: Final = Path(__file__).parents[1]
_PASSED: Final = "the whole flow passed\n"
_FLOW: Final = """
import sys
import grpc
from google.protobuf.empty_pb2 import Empty
from mnemosynerpc import session_pb2 as pb, session_pb2_grpc

address, authorities, canary = sys.argv[1:]
if authorities:
    credentials = grpc.ssl_channel_credentials(open(authorities, "rb").read())
    channel = grpc.secure_channel(address, credentials)
else:
    channel = grpc.insecure_channel(address)
stub = session_pb2_grpc.SessionManagerStub(channel)
new = pb.Session(subject_id="user:1", subject_client="web", refresh_token="r", bag={"k": canary})
started = stub.Start(pb.StartRequest(session=new)).session
token = started.access_token
assert len(token) == 128, token
got = stub.Get(pb.GetRequest(access_token=token)).session
assert dict(got.bag) == {"k": canary} and got.subject_id == "user:1" and got.refresh_token == "r"
assert got.expire_at.ToMilliseconds() >= started.expire_at.ToMilliseconds()
assert stub.Context(Empty(), metadata=(("authorization", token),)).session.access_token == token
assert stub.Exists(pb.ExistsRequest(access_token=token)).value is True
changed = stub.SetValue(pb.SetValueRequest(access_token=token, key="a", value="b"))
assert dict(changed.bag) == {"k": canary, "a": "b"}
assert [s.access_token for s in stub.List(pb.ListRequest(limit=5)).sessions] == [token]
assert stub.Abandon(pb.AbandonRequest(access_token=token)).value is True
try:
    stub.Get(pb.GetRequest(access_token=token))
except grpc.RpcError as error:
    assert error.code() is grpc.StatusCode.NOT_FOUND, error
    assert error.details() == "mnemosyned: storage: session not found", error
else:
    raise AssertionError("the session is still there")
stub.Start(pb.StartRequest(session=new))
assert stub.Delete(pb.DeleteRequest(subject_id="user:1")).value == 1
assert stub.Exists(pb.ExistsRequest(access_token=token)).value is False
print("the whole flow passed")
"""


def environment(name: str, *requirements: str, wheel: Path | None = None) -> str:
    """Return a Python that has these; made once for a checkout, and again when they have changed."""
    directory = ROOT / ".cache" / f"{name}-{sys.version_info.minor}"
    python, made = directory / "bin" / "python", directory / "made"
    wanted = repr((requirements, _contents(wheel)))
    directory.parent.mkdir(exist_ok=True)
    with (directory.parent / f"{name}.lock").open("w") as lock:
        # Another process of this run may be about to make it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
            files = () if wheel is None else (wheel,)
            command = [python, "-m", "pip", "install", "--quiet", *requirements, *files]
            subprocess.run(command, check=True)
            made.write_text(wanted)
    return str(python)


def _contents(wheel: Path | None) -> list[tuple[str, int]]:
    # The file as a whole differs from build to build, by its times.
    if wheel is None:
        return []
    with zipfile.ZipFile(wheel) as archive:
        return sorted((entry.filename, entry.CRC) for entry in archive.infolist())


def run_outside(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program that must find nothing of this checkout; its output is text."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Python would put the working directory in front of the path.
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=environ, cwd="/"
    )


def make_every_call(python: str, address: str, authorities: str = "") -> None:
    """Make every call of the service with the stubs that this Python finds, and check the answers."""
    done = run_outside(python, "-c", _FLOW, address, authorities, CANARY)
    assert done.stdout == _PASSED, done.stderr
