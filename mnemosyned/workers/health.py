"""What the admin port says of all workers together; asked of each through its Unix socket.

alive?   every worker is alive, or its process has ended and is started again. A worker that is stalled
         makes the whole not alive, as a daemon of one process would be. So does one that does not listen
         half a minute after its start
ready?   at least one worker is ready: connections go to those that serve (transport/turns.py), so clients
         get answers. `workers` in the answer shows each
cluster  the view of one worker, and under `workers` the view of each, by its name as a node
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlencode

from mnemosyned.admin.health import Readiness
from mnemosyned.place import admin_socket
from mnemosyned.workers.asking import NoAnswer, NotThere, get
from mnemosyned.workers.process import Phase

if TYPE_CHECKING:
    from mnemosyned.workers.process import WorkerProcess

_MAX_START_S: Final = 30.0
# While no worker answers: a page as of a node that has not joined (admin/cluster.py).
_NO_PAGE: Final[dict[str, Any]] = {
    "node": "",
    "owner": "",
    "status": "starting",
    "ring": {"fingerprint": "", "nodes": []},
    "members": [],
    "events": [],
}


class WorkersHealth:
    """Answers probes for all workers, on the loop of the admin thread; see admin/health.py."""

    def __init__(self, workers: Callable[[], Sequence[WorkerProcess]], count: int, directory: str) -> None:
        """`workers` are the processes that there are now; `count` is how many there should be."""
        self._workers = workers
        self._count = count
        self._directory = directory

    async def complaint(self) -> str:
        """Return why this daemon is not alive; empty: it is."""
        workers = self._workers()
        found = await asyncio.gather(*map(self._complaint_of, workers))
        return "; ".join(
            f"worker {worker.number}: {complaint}"
            for worker, complaint in zip(workers, found, strict=True)
            if complaint
        )

    async def _complaint_of(self, worker: WorkerProcess) -> str:
        if worker.phase is Phase.STARTING:
            return "" if worker.age_s < _MAX_START_S else f"it does not listen after {worker.age_s:.0f} s"
        try:
            status, body = await self._get(worker, "/healthz")
        except NotThere:
            # The supervisor is about to see its end.
            return ""
        except NoAnswer as exc:
            return f"its admin server: {exc}"
        return "" if status == HTTPStatus.OK else str(json.loads(body)["error"])

    async def readiness(self) -> Readiness:
        """Return whether any worker is ready, with what the first of these says, else the first of all."""
        workers = self._workers()
        found = await asyncio.gather(*map(self._readiness_of, workers))
        states = dict.fromkeys(map(str, range(1, self._count + 1)), Phase.STARTING.value)
        probes: dict[str, object] = {}
        is_ready = False
        for worker, (is_one_ready, its_probes) in zip(workers, found, strict=True):
            if worker.phase is not Phase.STARTING:
                states[str(worker.number)] = "SERVING" if is_one_ready else "NOT_SERVING"
            if not probes or (is_one_ready and not is_ready):
                probes = its_probes
            is_ready = is_ready or is_one_ready
        return Readiness(is_ready=is_ready, probes=probes | {"workers": states})

    async def _readiness_of(self, worker: WorkerProcess) -> tuple[bool, dict[str, object]]:
        try:
            status, body = await self._get(worker, "/healthr")
        except NoAnswer:
            return False, {}
        return status == HTTPStatus.OK, json.loads(body)["probes"]

    async def watch(self) -> NoReturn:
        """Do nothing: each worker watches itself."""
        await asyncio.Event().wait()
        raise AssertionError("it is never set")

    async def _get(self, worker: WorkerProcess, target: str) -> tuple[int, bytes]:
        return await get(admin_socket(self._directory, worker.number), target)


class ClusterPage:
    """`/debug/cluster` of all workers; called on threads of the admin server."""

    def __init__(
        self, workers: Callable[[], Sequence[WorkerProcess]], directory: str, admin_port: Callable[[], int]
    ) -> None:
        """`admin_port` is that of the daemon, where the page is."""
        self._workers = workers
        self._directory = directory
        self._admin_port = admin_port

    def __call__(self, query: Mapping[str, list[str]]) -> object:
        """Return what the first worker that answers shows; without a token, with what each shows."""
        pages = asyncio.run(self._pages("" if "token" not in query else query["token"][-1]))
        if not pages:
            pages = [_NO_PAGE]
        if "token" in query:
            return pages[0]
        by_name = {str(page["node"]): page for page in pages}
        return pages[0] | {"admin_port": self._admin_port(), "workers": by_name}

    async def _pages(self, token: str) -> list[dict[str, Any]]:
        target = f"/debug/cluster?{urlencode({'token': token})}" if token else "/debug/cluster"

        async def asked(worker: WorkerProcess) -> dict[str, Any] | None:
            try:
                return dict(json.loads((await get(admin_socket(self._directory, worker.number), target))[1]))
            except NoAnswer:
                return None

        found = await asyncio.gather(*map(asked, self._workers()))
        return [page for page in found if page is not None]
