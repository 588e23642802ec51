"""The files that the configuration names: read, followed while the daemon runs, and checked without it.

    at the start   tls, callers, the storage's address ──> reloader, which follows them (file_reloader.py)
                   secrets      ──> a warning for each that other users may read
    -check-config  the same reads and the same complaints, and nothing starts

Secrets and HMAC keys are read with the configuration itself (config/parsers.py), so an unusable one never
gets here. TLS files, callers and the file with the storage's address change while the daemon runs, and are
read here.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from mnemosyned.assembly import tls_files
from mnemosyned.config.files import exposure_of
from mnemosyned.config.flags import ConfigError
from mnemosyned.security import api_keys
from mnemosyned.security.config import AuthConfig
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable, log_exposures
from mnemosyned.security.tls import tls_reloader
from mnemosyned.storage.engines import StorageConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.security.api_keys import Callers
    from mnemosyned.security.tls import TlsMaterial

log = logging.getLogger(__name__)


def follow_tls(config: Config) -> FileReloader[TlsMaterial] | None:
    """Return the reloader of the TLS files; None without `-tls`.

    Raises:
        ConfigError: the files are unusable; the text is one line that names the flag.
    """
    files = tls_files(config)
    if files is None:
        return None
    try:
        return tls_reloader(files)
    except FilesUnusable as exc:
        raise ConfigError(f"flag -tls: {exc}") from exc


def follow_callers(config: Config) -> FileReloader[Callers] | None:
    """Return the reloader of the callers; None without `-auth.keys`. Raises ConfigError, as `follow_tls`."""
    path = config[AuthConfig].keys_file
    if not path:
        return None
    try:
        return FileReloader("keys", [path], partial(api_keys.read, path), secret_paths=[path])
    except FilesUnusable as exc:
        raise ConfigError(f"flag -auth.keys: {exc}") from exc


def follow_address(config: Config) -> FileReloader[str] | None:
    """Return the reloader of the storage's address; None if no file holds it. Raises ConfigError."""
    try:
        return config[StorageConfig].engine.follow_address(config)
    except FilesUnusable as exc:
        raise ConfigError(str(exc)) from exc


def warn(config: Config, tls: FileReloader[TlsMaterial] | None) -> None:
    """Log what is unsafe in the files, and does not stop the start."""
    log_exposures({path: f"-{name}" for name, path in config.secret_files().items()})
    if tls is None:
        return
    for complaint in _complaints(tls.content):
        log.warning("tls_certificate_not_valid_now", extra={"error": complaint})


def check(config: Config) -> list[str]:
    """Read all files as a start does; return warnings, one line each.

    Stricter than a start in one point: certificates whose time is over are an error, since a node with them
    starts, and no client accepts it.

    Raises:
        ConfigError: a start would fail, or no client would accept the certificate.
    """
    tls = follow_tls(config)
    follow_callers(config)
    if tls is not None:
        for complaint in _complaints(tls.content):
            raise ConfigError(f"flag -tls: {complaint}")
    exposures = {name: exposure_of(path) for name, path in config.secret_files().items()}
    return config.warnings() + [
        f"flag -{name}: {one.path}: {one.event.replace('_', ' ')}; {one.advice}"
        for name, one in exposures.items()
        if one is not None
    ]


def _complaints(material: TlsMaterial) -> list[str]:
    now_s = time.time()
    return [text for text in (material.complaint(now_s), material.authorities_complaint(now_s)) if text]
