"""The addresses `embedded:…`: which directory each names. Nothing is created or looked at here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mnemosyned.embedded.programs import EmbeddedError


def data_directory(address: str, environ: Mapping[str, str], name: str = "postgres") -> Path:
    """Return the directory that an `embedded:` address names.

    `embedded:` alone is `mnemosyned/NAME` under `$XDG_DATA_HOME` or `~/.local/share`;
    `embedded:///abs/dir` and `embedded:rel/dir` are what they say.

    Raises:
        EmbeddedError: there is no home directory.
    """
    path = address.removeprefix("embedded:").removeprefix("//")
    if path:
        return Path(path).absolute()
    base = Path(environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():  # the XDG specification: ignore a relative one
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError:
            raise EmbeddedError("no home directory: set XDG_DATA_HOME or use embedded:///dir") from None
    return base / "mnemosyned" / name
