"""A tour of the client: `python -m mnemosynerpc.example [host:port]`."""

import sys

import grpc

from mnemosynerpc import command
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub


def main(address: str = "127.0.0.1:8080") -> None:
    with grpc.insecure_channel(address) as channel:
        sessions = SessionManagerStub(channel)

        # A user logs in; the service makes the token.
        new = Session(subject_id="user:17", subject_client="web", bag={"name": "Ada"})
        token = sessions.Start(StartRequest(session=new), timeout=3).session.access_token

        # Each request that carries the token reads the session, and so extends it.
        session = sessions.Get(GetRequest(access_token=token), timeout=3).session
        print(f"{session.bag['name']} is logged in until {session.expire_at.ToDatetime()} UTC")

        # The bag holds what the services want to share about the session.
        change = SetValueRequest(access_token=token, key="theme", value="dark")
        print("the bag:", dict(sessions.SetValue(change, timeout=3).bag))

        # One session ends; then every session of the user does, everywhere, at once.
        sessions.Abandon(AbandonRequest(access_token=token), timeout=3)
        sessions.Delete(DeleteRequest(subject_id="user:17"), timeout=3)

        try:
            sessions.Get(GetRequest(access_token=token), timeout=3)
        except grpc.RpcError as error:
            print("after that:", error.code().name, "-", error.details())


if __name__ == "__main__":
    sys.exit(command.run(main, "mnemosynerpc.example [HOST:PORT]", command.host_port, start="make run"))
