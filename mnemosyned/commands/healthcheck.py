"""Whether this container's daemon is alive: `python -m mnemosyned.commands.healthcheck`, for HEALTHCHECK.

Asks `/healthz` on the admin port that the flags in the environment give. Exit codes: 0 alive, 1 not.
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
    """Return the exit code."""
    try:
        config = settings.parse([], os.environ)
        scheme, context = "http", None
        if config[TlsConfig].is_on:
            # This very container is asked, whatever name its certificate has.
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
