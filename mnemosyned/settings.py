"""All settings of the daemon: the sections that its parts declare, in the order of `-help`.

    a part's config.py ── Section, with its flags ──> SECTIONS ──> FLAGS ──> parser, -help, README, shells
                                                               └─> SECRET_FLAGS ──> process title, log filter

- A new setting goes into the section of its owner, and nowhere else.
- A new section is named in SECTIONS. The section of a storage engine comes with its entry in
  `storage/engines.py`.

This module imports only the sections, which import little: `mnemosyned -version` must be quick. What parses
is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.config.flags import ConfigError, Section, flags_by_name, setting
from mnemosyned.config.parsers import boolean, workers
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.security.config import AuthConfig, GuessConfig, TlsConfig
from mnemosyned.sessions.config import CacheConfig, SessionsConfig
from mnemosyned.storage import engines
from mnemosyned.transport.config import GrpcConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(Section):
    """What the daemon does with its configuration."""

    TITLE = "Running"
    EXAMPLE = "mnemosyned -config=/etc/mnemosyned.toml -check-config"

    only_checks: bool = setting(
        "check-config", "false", boolean, "check flags, environment and all files, and exit"
    )
    has_core_dumps: bool = setting(
        "core-dumps",
        "false",
        boolean,
        "allow core dumps and debuggers; a core dump has all cached sessions and secrets",
    )
    workers: int = setting(
        "workers",
        "1",
        workers,
        "processes that share the gRPC port, each a node of the cluster; auto: one for each processor",
    )

    def check(self, config: Config) -> None:
        """See Section: what several processes cannot share."""
        if self.workers == 1:
            return
        storage, grpc = config[engines.StorageConfig], config[GrpcConfig]
        if not storage.engine.capabilities.is_shared:
            raise ConfigError(
                f"flag -workers: with -storage={storage.name} each process would have its own sessions; "
                "it takes one worker"
            )
        if grpc.engine != "h2":
            raise ConfigError(
                f"flag -workers: -grpc.engine={grpc.engine} opens its sockets itself and cannot share them; "
                "it takes one worker"
            )
        config[ClusterConfig].check_ports_of(self.workers, grpc)


# A section's `check` sees the others through the whole configuration, so the order is for `-help` alone.
SECTIONS: Final[tuple[type[Section], ...]] = (
    GrpcConfig,
    SessionsConfig,
    CacheConfig,
    *engines.sections(),
    ClusterConfig,
    AuthConfig,
    GuessConfig,
    TlsConfig,
    ObserveConfig,
    RunConfig,
)
FLAGS: Final = flags_by_name(SECTIONS)
SECRET_FLAGS: Final = frozenset(flag.name for flag in FLAGS.values() if flag.is_secret)


def parse(argv: Sequence[str], environ: Mapping[str, str], *more: type[Section]) -> Config:
    """Return the daemon's configuration, from the command line, the environment and the file.

    `more` are sections of a command, which the daemon does not have.

    Raises:
        ConfigError: a value is wrong, or two do not go together; the text is one line that names the flag.
    """
    # Its libraries take longer to import than all sections, and not every command needs them.
    from mnemosyned.config import config

    return config.parse(argv, environ, (*SECTIONS, *more))
