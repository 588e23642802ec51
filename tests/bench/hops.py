"""How many of our own functions a call enters, and in how many files: `make hops`.

A reader of the code follows a call through these functions. The server runs in this process, on the engine h2
and a real PostgreSQL; the client's own functions are not ours.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

from mnemosynerpc.session_pb2 import AbandonRequest, GetRequest, Session, StartRequest
from prometheus_client import CollectorRegistry

# First: tests/ has a folder of this name.
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

from peering import Peer, peering, until_they_serve_copies
from serving import configured, serving

from mnemosyned.storage.engines import StorageConfig, Surroundings

ROOT = str(Path(__file__).parents[2])
OWN = tuple(f"{ROOT}/{package}/" for package in ("aio", "cache", "cluster", "http2", "mnemosyned"))
# What goes on besides the call.
BACKGROUND = (
    "periodic.py",
    "gossip.py",
    "core_timer.py",
    "swim.py",
    "touches.py",
    "health.py",
    "table.py",
    "dissemination.py",
    "node_table.py",
)


class Hops:
    """The functions that were entered between `start` and `stop`."""

    def __init__(self) -> None:
        self.entered: Counter[tuple[str, str]] = Counter()

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(OWN) and not path.endswith(BACKGROUND):
            self.entered[path.removeprefix(ROOT + "/"), frame.f_code.co_qualname] += 1

    async def of(self, call: Callable[[], Awaitable[object]]) -> None:
        sys.setprofile(self._see)
        await call()
        await asyncio.sleep(0.05)
        sys.setprofile(None)

    def report(self, name: str, *, is_long: bool) -> None:
        functions, files = len(self.entered), {path for path, _ in self.entered}
        print(f"{name:24} {functions:4} functions {len(files):3} files")
        if is_long:
            for (path, function), count in self.entered.items():
                print(f"    {path}: {function} x{count}")


async def main(dsn: str) -> None:
    is_long = "-v" in sys.argv[1:]
    config = configured(f"-postgres.address={dsn}")
    store = config[StorageConfig].engine.build(config, Surroundings(registry=CollectorRegistry()))
    await store.open()
    async with serving(store) as node:
        token = (await node.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token
        get, abandon = GetRequest(access_token=token), AbandonRequest(access_token=token)
        for name, call, prepare in (
            ("cached Get", lambda: node.stub.Get(get), lambda: None),
            ("missed Get", lambda: node.stub.Get(get), lambda: node.cache.drop(token)),
            ("Start", lambda: node.stub.Start(StartRequest(session=Session(subject_id="s"))), lambda: None),
            ("Abandon", lambda: node.stub.Abandon(abandon), lambda: None),
        ):
            hops = Hops()
            prepare()
            await hops.of(call)
            hops.report(name, is_long=is_long)
    async with peering(store) as one, peering(store, seeds=(one.address,)) as other:
        await clustered(one, other, is_long=is_long)
    await store.close()


async def clustered(one: Peer, other: Peer, *, is_long: bool) -> None:
    await until_they_serve_copies(one, other)
    tokens = [str(number) for number in range(99)]
    own = next(token for token in tokens if one.node.view.ring.owner(token) == one.address)
    foreign = next(token for token in tokens if one.node.view.ring.owner(token) == other.address)
    for token in (own, foreign):
        await one.stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")))
    calls = {
        "cluster, cached Get": lambda: one.stub.Get(GetRequest(access_token=own)),
        "cluster, forwarded Get": lambda: one.stub.Get(GetRequest(access_token=foreign)),
        "cluster, own Abandon": lambda: one.stub.Abandon(AbandonRequest(access_token=own)),
    }
    for name, call in calls.items():
        if name.endswith("Get"):
            await call()
        hops = Hops()
        await hops.of(call)
        hops.report(name, is_long=is_long)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, EmbeddedPostgres.start(Path(directory) / "pg") as server:
        asyncio.run(main(server.dsn))
