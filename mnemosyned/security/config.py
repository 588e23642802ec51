"""The settings of TLS, of callers, of guesses, and of tokens at rest.

Files are named here and read elsewhere. Two kinds differ in when they take effect:

- TLS files and the file of callers are read once a second (file_reloader.py). Here the TLS files are only
  read, so that an unusable one ends the start with one line that names the flag.
- The keys of tokens are read here, once. A change needs a restart: with another key every stored token has
  another name, so two nodes must not switch at different times without a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

from mnemosyned.config.files import FileRefused, read_bytes
from mnemosyned.config.flags import ConfigError, Section, setting
from mnemosyned.config.parsers import (
    boolean,
    duration,
    file_name,
    host_names,
    integer,
    one_of,
    secret_file,
    words_in,
)

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

MAX_KEYS: Final = 2  # the key in use, and the other key of a rotation
_MIN_TOKEN_KEY: Final = 32  # characters; the key protects tokens against a reader of the database


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig(Section):
    """The files of TLS, and who must show a certificate."""

    TITLE = "TLS"
    EXAMPLE = "mnemosyned -tls -tls.crt=node.pem -tls.key=node.key -tls.ca=ca.pem"

    is_on: bool = setting("tls", "false", boolean, "serve both ports, and dial peers, over TLS")
    certificate: str = setting("tls.crt", "", file_name, "PEM file of this node's certificate chain")
    private_key: str = setting("tls.key", "", secret_file, "PEM file of the private key of -tls.crt")
    authorities: str = setting(
        "tls.ca", "", file_name, "PEM file of the authorities that sign the certificates of clients and peers"
    )
    client_auth: str = setting(
        "tls.client-auth",
        "none",
        one_of("none", "optional", "require"),
        "whether gRPC clients show a certificate: none, optional (not with grpcio) or require",
    )
    peer_names: tuple[str, ...] = setting(
        "tls.peer-names",
        "",
        host_names,
        "names in the certificates of nodes, comma-separated, also *.domain; such nodes need no secret",
        is_list=True,
    )

    def check(self, _: Config) -> None:
        """See Section."""
        files = {"tls.crt": self.certificate, "tls.key": self.private_key, "tls.ca": self.authorities}
        for name, path in files.items():
            if not self.is_on and path:
                raise ConfigError(f"flag -{name} is given, and -tls is not")
            if self.is_on and not path and name != "tls.ca":
                raise ConfigError(f"flag -tls needs -{name}")
            if path:
                _check_readable(name, path)
        if self.client_auth != "none" and not self.authorities:
            raise ConfigError(f"flag -tls.client-auth: {self.client_auth} needs -tls.ca, and that -tls")
        if self.peer_names and self.client_auth == "none":
            raise ConfigError(
                "flag -tls.peer-names: nodes show no certificate while -tls.client-auth is none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig(Section):
    """Who may call, and what the storage keeps of tokens."""

    TITLE = "Callers and tokens"
    EXAMPLE = "mnemosyned -auth.keys=callers.txt -token.protection=hmac -token.key.file=token.key"

    keys_file: str = setting(
        "auth.keys",
        "",
        secret_file,
        "file of callers, one a line: a role, and a key's hash or a certificate's name; empty: all may call",
    )
    token_protection: str = setting(
        "token.protection",
        "none",
        one_of("none", "hmac"),
        "what the storage keeps of a token: none (the token itself) or hmac (its HMAC-SHA256)",
    )
    token_key_file: str = setting(
        "token.key.file",
        "",
        secret_file,
        "file with the HMAC key, or with two keys in a rotation, one a line; the first is in use",
    )
    token_keys: tuple[str, ...] = field(default=(), repr=False)  # the content of `token_key_file`

    def resolved(self, _: Mapping[str, str]) -> Self:
        """See Section."""
        path = self.token_key_file
        if not path:
            return self
        keys = tuple(dict.fromkeys(words_in("token.key.file", path)))
        if any(len(key) < _MIN_TOKEN_KEY for key in keys):
            raise ConfigError(
                f"flag -token.key.file: {path}: a key is shorter than {_MIN_TOKEN_KEY} characters; "
                "try `openssl rand -hex 32`"
            )
        if len(keys) > MAX_KEYS:
            raise ConfigError(
                f"flag -token.key.file: {path}: more than {MAX_KEYS} keys; two are for a rotation"
            )
        return replace(self, token_keys=keys)

    def check(self, _: Config) -> None:
        """See Section."""
        if self.token_protection != "none" and not self.token_keys:  # noqa: S105  # a mode
            raise ConfigError("flag -token.protection: hmac needs -token.key.file")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessConfig(Section):
    """From when on the unknown tokens and keys of one caller count as guesses.

    A caller is mostly an application, not a user, so the threshold is far above those of tools that count the
    failures of one user (fail2ban: 5 in 10 minutes). A user who returns after the end of the session causes
    some unknown tokens. An application with a million such users a day causes about 700 a minute.
    """

    TITLE = "Guesses"
    EXAMPLE = "mnemosyned -guess.threshold=5000 -guess.limit=20000"

    threshold: int = setting(
        "guess.threshold",
        "1000",
        integer(1, 10**9),
        "unknown tokens and API keys of one caller in -guess.window, beyond which the log warns",
    )
    window_s: float = setting(
        "guess.window", "1m", duration(1), "time in which -guess.threshold and -guess.limit count"
    )
    limit: int = setting(
        "guess.limit",
        "0",
        integer(0, 10**9),
        "such tokens and keys of one caller, beyond which it is told of further ones late, or gets "
        "RESOURCE_EXHAUSTED; 0: no limit",
    )


def _check_readable(name: str, path: str) -> None:
    try:
        read_bytes(path, holds_secret=name == "tls.key")
    except FileRefused as exc:
        raise ConfigError(f"flag -{name}: {path}: {exc}") from None
