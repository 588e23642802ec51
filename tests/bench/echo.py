"""The least that a gRPC server can do, on zttp and uvloop: read the request, send a constant of N bytes.

It looks at no path, header or limit, and holds nothing back. What the daemon costs more is what the daemon
does. A connection ends after 4,096 streams, because zttp ends it.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
import zttp

PORT, SIZE = int(sys.argv[1]), int(sys.argv[2])
HEADERS = [(b"content-type", b"application/grpc")]
BODY = b"\0" + SIZE.to_bytes(4, "big") + b"x" * SIZE
TRAILERS = [(b"grpc-status", b"0")]


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # asyncio's declaration
        self._core = zttp.Connection(zttp.SERVER, zttp.HTTP2)
        self._core.initiate_connection()
        self._transport.write(self._core.data_to_send())

    def data_received(self, data: bytes) -> None:
        core = self._core
        core.receive_data(data)
        while (event := core.next_event()) is not zttp.NEED_DATA:
            if isinstance(event, zttp.EndOfMessage):
                stream = core.stream(event.stream_id)
                stream.send_response(200, HEADERS)
                stream.send_data(BODY)
                stream.end_message(TRAILERS)
        self._transport.write(core.data_to_send())


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", PORT)
    await server.serve_forever()


uvloop.run(main())
