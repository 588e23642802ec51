"""The least that a gRPC server on h2corn can do: read the request, send a constant of N bytes."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h2corn
import uvloop

PORT, SIZE = int(sys.argv[1]), int(sys.argv[2])
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}
BODY = {
    "type": "http.response.body",
    "body": b"\0" + SIZE.to_bytes(4, "big") + b"x" * SIZE,
    "more_body": False,
}
TRAILERS = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}


async def app(_: Any, receive: Any, send: Any) -> None:  # noqa: ANN401  # ASGI's shapes
    await receive()
    await send(START)
    await send(BODY)
    await send(TRAILERS)


async def main() -> None:
    config = h2corn.Config(
        bind=(f"127.0.0.1:{PORT}",),
        grpc=True,
        http1=False,
        lifespan="off",
        access_log=False,
        date_header=False,
    )
    await h2corn.Server(app, config).serve()


asyncio.run(main(), loop_factory=uvloop.new_event_loop) if sys.version_info >= (3, 12) else uvloop.run(main())
