"""What a daemon says of itself when it begins: where it listens, and what is unsafe in its settings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from cluster.peer_auth import is_loopback
from mnemosyned import __version__
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.line_writer import LineWriter
from mnemosyned.ports import admin_host, is_plaintext_exposed
from mnemosyned.security.config import AuthConfig, TlsConfig
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.transport.config import GrpcConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.storage.engines import PrivateServer

log = logging.getLogger(__name__)

_STANDARD_OUTPUT: Final = 1


def storage_shown(config: Config, server: PrivateServer | None) -> str:
    """Return where sessions are stored, for the log."""
    return config[StorageConfig].name if server is None else str(server.directory)


def announce(config: Config, where: Mapping[str, object]) -> None:
    """Log where the daemon listens, and warn of settings that are safe only for trials."""
    grpc, tls, storage = config[GrpcConfig], config[TlsConfig], config[StorageConfig]
    is_for_people = config[ObserveConfig].log_environment == "development"
    log.info("configuration", extra={"flags": config.shown(with_defaults=not is_for_people)})
    log.info("listening", extra={"version": __version__, "engine": grpc.engine, **where})
    if not (config[AuthConfig].keys_file or tls.client_auth == "require" or is_loopback(admin_host(grpc))):
        log.warning("anybody_may_call", extra={"host": grpc.host, "flags": "-auth.keys, -tls.client-auth"})
    if is_plaintext_exposed(config):
        log.warning("cluster_without_tls", extra={"flags": "-tls, -cluster.plaintext"})
    if not storage.engine.capabilities.is_durable:
        log.warning("storage_forgets_all_sessions_at_exit", extra={"storage": storage.name})
    if not storage.engine.capabilities.is_shared and config[ClusterConfig].listen:
        log.warning("storage_is_for_a_single_node", extra={"storage": storage.name})


_WELCOME: Final = """
mnemosyned {version}
  gRPC     {grpc}
  metrics  {admin}/metrics, health on /healthz and /healthr
  data     {storage}
  try it   {python} -m mnemosynerpc.example {grpc}
  stop it  Ctrl-C

"""


def greet(config: Config, where: Mapping[str, object]) -> None:
    """Say to a person in development where the daemon serves."""
    if config[ObserveConfig].log_environment == "development":
        # On a thread, and not awaited: it may be a pipe that nothing reads.
        text = _WELCOME.format(version=__version__, python=sys.executable, **where)
        LineWriter(_STANDARD_OUTPUT).put(text)
