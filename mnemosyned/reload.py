"""SIGHUP: files and settings are read again, and one line says what came of it.

    files that are followed   TLS, callers, address of the storage: taken, or the old content stays
    configuration             flags, environment and file are parsed again, with the files that they name:
                                -cluster.secret and its file     taken
                                -log.level                       taken
                                the address in its file          followed, as above
                                everything else that differs     named: it needs a restart

    all of it taken ──> `reloaded`            something refused ──> `reload_refused`, with the reasons

What is refused stays as it was, and the rest is taken: each part is checked by itself. The cluster's secret
is taken here and not followed, because nodes must change it in a sequence (node_config.py). Keys of tokens
need a restart, since all stored tokens have names made with them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from mnemosyned.config.flags import ConfigError, flags_of
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe import logs
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.security.config import AuthConfig
from mnemosyned.settings import SECTIONS
from mnemosyned.storage.mongodb.config import MongoConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.redis.config import RedisConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.security.file_reloader import FileReloader

log = logging.getLogger(__name__)

# Fields with the content of a file, by the flag that names the file.
_CONTENTS: Final = {"token.key.file": (AuthConfig, "token_keys")}


class Renewable(Protocol):
    """What uses the cluster's secrets."""

    def renew_secrets(self, secrets: Sequence[str]) -> None:
        """Use these from now on. Raises ValueError."""
        ...


class Reload:
    """What SIGHUP does; `ask` may be called at any time, and `run` does it."""

    def __init__(
        self,
        config: Config,
        parse: Callable[[], Config],
        files: Sequence[FileReloader[Any] | None],
        node: Renewable | None,
    ) -> None:
        """`config` is what the daemon runs with; `parse` reads it again, and raises ConfigError."""
        self._config = config
        self._parse = parse
        self._files = [one for one in files if one is not None]
        self._node = node
        self._secret = config[ClusterConfig].secret
        self.log_level = config[ObserveConfig].log_level  # as it is now
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read everything again soon; once, if it is asked for several times meanwhile."""
        self._asked.set()

    async def run(self) -> None:
        """Reload each time it is asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                await self._reload()
            except Exception as exc:  # the root of the task: a bug must not end the daemon
                log.error("reload_failed", exc_info=exc)

    async def _reload(self) -> None:
        refused: list[str] = []
        taken: list[str] = []
        for files in self._files:
            complaint = await files.reload()
            if complaint:
                refused.append(complaint)
            else:
                taken.append(files.name)
        need_restart: list[str] = []
        try:
            # On a thread: it reads files.
            config = await asyncio.to_thread(self._parse)
        except ConfigError as exc:
            refused.append(str(exc))
        else:
            taken += self._taken_of(config, refused)
            need_restart = self._need_restart(config)
        fields_of_line = {"taken": taken, "need_restart": need_restart}
        if refused:
            # A file may be refused in the same words by what follows it and by what parses the configuration.
            error = "; ".join(dict.fromkeys(refused))
            log.error("reload_refused", extra={"error": error, **fields_of_line})
        else:
            log.info("reloaded", extra=fields_of_line)

    def _taken_of(self, config: Config, refused: list[str]) -> list[str]:
        """Let settings take effect that may change; return their flags, and add what is refused."""
        taken: list[str] = []
        secret, level = config[ClusterConfig].secret, config[ObserveConfig].log_level
        if self._node is not None and secret != self._secret:
            try:
                self._node.renew_secrets(secret)
            except ValueError as exc:
                refused.append(f"flag -cluster.secret: {exc}; it needs a restart")
            else:
                self._secret = secret
                taken.append("cluster.secret")
        if level != self.log_level:
            self.log_level = level
            logs.set_level(level)
            taken.append("log.level")
        return taken

    def _need_restart(self, config: Config) -> list[str]:
        """Return the flags that differ from those the daemon runs with, and did not take effect."""
        changed = [
            flag.name
            for section in SECTIONS
            for name, flag in flags_of(section).items()
            if getattr(self._config[section], name) != getattr(config[section], name)
        ]
        changed += [
            flag
            for flag, (section, name) in _CONTENTS.items()
            if getattr(self._config[section], name) != getattr(config[section], name)
        ]
        followed = {"cluster.secret", "log.level"}
        if self._config[PostgresConfig].address_file:
            followed.add("postgres.address")
        if self._config[RedisConfig].address_file:
            followed.add("redis.address")
        if self._config[MongoConfig].address_file:
            followed.add("mongodb.address")
        if self._node is None:
            followed.discard("cluster.secret")
        return [name for name in dict.fromkeys(changed) if name not in followed]
