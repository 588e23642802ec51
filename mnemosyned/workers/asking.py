"""A request to the admin server of a worker, through its Unix socket."""

from __future__ import annotations

import asyncio
from typing import Final

# A worker answers its own probes within 0.9 s (admin/health.py).
TIMEOUT_S: Final = 1.5
_MAX_BYTES: Final = 64 * 1024**2


class NoAnswer(Exception):
    """The worker did not answer: it is stopped or stalled, or its answer is none."""


class NotThere(NoAnswer):
    """Nothing listens at its socket: the worker has ended, or is about to."""


async def get(socket_path: str, target: str, *, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes]:
    """Return status and body. Raises NoAnswer or NotThere."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            try:
                writer.write(f"GET {target} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read(_MAX_BYTES)).partition(b"\r\n\r\n")
                while chunk := await reader.read(_MAX_BYTES):
                    body += chunk
            finally:
                writer.transport.abort()
    except TimeoutError:  # an OSError too
        raise NoAnswer("no answer in time") from None
    except OSError as exc:
        raise NotThere(exc.strerror or str(exc)) from None
    words = head.split(maxsplit=2)
    if len(words) < 2 or not words[1].isdigit():  # noqa: PLR2004  # version and status
        raise NoAnswer("no answer of HTTP")
    return int(words[1]), body
