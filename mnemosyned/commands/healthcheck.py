"""Whether this container's daemon is alive: `python -m mnemosyned.commands.healthcheck`, for HEALTHCHECK.

Asks `/healthz` on the admin port that the flags in the environment give. Exit codes: 0 alive, 1 not alive.

Alive and not ready: `/healthz` does not depend on the storage. A daemon without its database serves cached
sessions and recovers by itself, and a restart would only lose its cache. `/healthr` tells readiness.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request
from typing import Final

from mnemosyned import settings
from mnemosyned.config.flags import ConfigError
from mnemosyned.security.config import TlsConfig
from mnemosyned.transport.config import GrpcConfig

_TIMEOUT_S: Final = 2.0


def main() -> int:
    """Ask once, within 2 s; return the exit code."""
    try:
        config = settings.parse([], os.environ)
        scheme, context = "http", None
        if config[TlsConfig].is_on:
            # The certificate is for the node's name and not for 127.0.0.1. The connection stays inside the
            # container, so nothing is verified.
            scheme, context = "https", ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        url = f"{scheme}://127.0.0.1:{config[GrpcConfig].port + 1}/healthz"
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(url, timeout=_TIMEOUT_S):
            return 0
    except (OSError, ConfigError) as exc:
        sys.stderr.write(f"mnemosyned: not alive: {exc}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
