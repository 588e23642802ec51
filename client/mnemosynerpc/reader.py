"""Read one session through several nodes, again and again: `python -m mnemosynerpc.reader [IP:PORT,…]`.

The channel balances between the nodes by itself and tries another one when a node is gone. Nodes with
`-grpc.advertise` say where the session is owned, and the reader goes there (owners.py).
"""

import json
import sys
import time

import grpc

from mnemosynerpc import command
from mnemosynerpc.owners import OwnerReader
from mnemosynerpc.session_pb2 import AbandonRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "mnemosynerpc.SessionManager"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


def main(addresses: str = "127.0.0.1:8080,127.0.0.1:8082,127.0.0.1:8084", seconds: str = "inf") -> None:
    options = [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        # Else the whole list would be sent as the name of the server, which no server takes.
        ("grpc.default_authority", "mnemosyned"),
    ]
    with grpc.insecure_channel(f"ipv4:{addresses}", options=options) as channel:
        sessions = SessionManagerStub(channel)
        new = Session(subject_id="user:17", bag={"name": "Ada"})
        token = sessions.Start(StartRequest(session=new), timeout=3).session.access_token
        reader = OwnerReader(channel)
        end_s, read, failed = time.monotonic() + float(seconds), 0, 0
        while time.monotonic() < end_s:
            try:
                reader.get(token)
                read += 1
            except grpc.RpcError as error:
                failed += 1
                print(error.code().name, "-", error.details())
            print(f"\r{read} reads, {reader.at_owners} at the owner, {failed} failed", end="", flush=True)
            time.sleep(0.01)
        print()
        reader.close()
        sessions.Abandon(AbandonRequest(access_token=token), timeout=3)


if __name__ == "__main__":
    usage = "mnemosynerpc.reader [IP:PORT,… [SECONDS]]"
    sys.exit(command.run(main, usage, command.ip_ports, float, start="make cluster"))
