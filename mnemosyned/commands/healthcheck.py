"""Whether the daemon of this container is alive: `python -m mnemosyned.alive`, for HEALTHCHECK.

Asks `/healthz` on the operator's port that flags in the environment give; exit code 0 or 1.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request
from typing import Final

from mnemosyned.config import config as configuration

_TIMEOUT_S: Final = 2.0


def main() -> int:
    """Return 0 if it is."""
    try:
        config = configuration.parse([], os.environ)
        scheme, context = "http", None
        if config.tls:
            # It is this very container that is asked, whatever its certificate's name.
            scheme, context = "https", ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        url = f"{scheme}://127.0.0.1:{config.port + 1}/healthz"
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(url, timeout=_TIMEOUT_S):
            return 0
    except (OSError, configuration.ConfigError) as exc:
        sys.stderr.write(f"mnemosyned: not alive: {exc}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
