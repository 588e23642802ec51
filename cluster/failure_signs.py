"""Does the host of a member say that its process is not there? It refuses to be dialled then."""

from __future__ import annotations

import asyncio
from typing import Final

# Within one network a reset takes milliseconds.
_DIAL_TIMEOUT_S: Final = 0.2


async def is_refused(address: str, unix_path: str = "") -> bool:
    """Dial an address, or a socket on this host; tell whether the host says that no process listens there.

    A host that is down, or a network that drops packets, gives no answer. That proves nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            if unix_path:
                _, writer = await asyncio.open_unix_connection(unix_path)
            else:
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
