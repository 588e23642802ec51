"""HTTP/2 connections without I/O: bytes in, decisions, bytes out. Servers and clients of gRPC stand on it.

    asyncio protocol ── bytes ──> ServerConnection or ClientConnection ── bytes ──> asyncio protocol
                                      |          |         |
                          FrameScanner (frames)  |     Outbox (outbox)
                                                Core (core: the library zttp)

- core.py: the library that parses and writes HTTP/2, and what is missing in it.
- frames.py: which frames a chunk of bytes holds, before the library sees it.
- outbox.py: bodies that wait until the peer can take them.
- server.py, client.py: the decisions about a connection; each has its theory at its top.

Nothing here reads a clock or touches a socket: instants come in as arguments. So a test drives a connection
through hours and floods within milliseconds.
"""
