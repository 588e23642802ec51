"""The Go project's own Python client of 2018, unchanged, in an environment of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority
from processes import Daemon

ENVIRONMENT = Path(__file__).parents[2] / ".cache" / f"legacy-client-{sys.version_info.minor}"
REQUIREMENTS = ("mnemosyne-client==0.18.4", "protobuf==3.20.3", "grpcio")

FLOW = """
import sys
import grpc
from google.protobuf.empty_pb2 import Empty
from mnemosynerpc import session_pb2 as pb, session_pb2_grpc

address, authorities = sys.argv[1:]
if authorities:
    credentials = grpc.ssl_channel_credentials(open(authorities, "rb").read())
    channel = grpc.secure_channel(address, credentials)
else:
    channel = grpc.insecure_channel(address)
stub = session_pb2_grpc.SessionManagerStub(channel)
new = pb.Session(subject_id="user:1", subject_client="web", refresh_token="r", bag={"k": "v"})
started = stub.Start(pb.StartRequest(session=new)).session
token = started.access_token
assert len(token) == 128, token
got = stub.Get(pb.GetRequest(access_token=token)).session
assert dict(got.bag) == {"k": "v"} and got.subject_id == "user:1" and got.refresh_token == "r"
assert got.expire_at.ToMilliseconds() >= started.expire_at.ToMilliseconds()
assert stub.Context(Empty(), metadata=(("authorization", token),)).session.access_token == token
assert stub.Exists(pb.ExistsRequest(access_token=token)).value is True
changed = stub.SetValue(pb.SetValueRequest(access_token=token, key="a", value="b"))
assert dict(changed.bag) == {"k": "v", "a": "b"}
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


@pytest.fixture(scope="module")
def legacy_python() -> str:
    """Return a Python that has the client; made once for a checkout."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "done"
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    with (ENVIRONMENT.parent / "legacy-client.lock").open("w") as lock:
        # Another process of this run may be about to make it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
            done.touch()
    return str(python)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", ["h2corn", "grpcio"])
@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_the_whole_flow_passes(
    legacy_python: str, postgres_dsn: str, engine: str, wire: str, tmp_path: Path
) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    authority = Authority(tmp_path)
    flags = authority.flags("127.0.0.1") if wire == "tls" else []
    with Daemon(f"-postgres.address={postgres_dsn}", f"-grpc.engine={engine}", *flags) as daemon:
        authorities = str(authority.path) if wire == "tls" else ""
        command = [legacy_python, "-c", FLOW, daemon.serving().address, authorities]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environ)

    assert run.stdout == "the whole flow passed\n", run.stderr
