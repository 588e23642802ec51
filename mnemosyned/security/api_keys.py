"""Who may call what: the file of `-auth.keys`.

    session sha256:5d41…c3      # the web application
    admin   name:*.ops.example  # any client with such a name in its certificate

Each line has a role and a caller. The caller is `sha256:` and the hash of an API key, or `name:` and a name
in a client's certificate. `*.domain` stands for one label more. What follows a `#` is a comment.

- The file holds hashes, so a reader of the file cannot call. A key is 32 random bytes, which are not guessed,
  so one round of SHA-256 is as good as many. Every call costs that hash, so a slow one is no choice.
- A wrong line makes the whole file invalid. At the start that ends the daemon; later the callers of before
  stay (file_reloader.py). A file half of which takes effect would lock out callers without a word.
- An error never quotes a line: a key that was not hashed by mistake would be in the log.

`api/auth.py` has what each role may call.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from cluster.peer_auth import matches_name
from mnemosyned.config.files import FileRefused, read_bytes, text_of
from mnemosyned.security.file_reloader import FilesUnusable

_KEY_BYTES: Final = 32
_PREFIX: Final = "mnk_"
MIN_KEY_LENGTH: Final = 32  # characters, of a key that was not made here
# Certificates are compared with each name in turn; and a file this long is a mistake.
_MAX_ENTRIES: Final = 10_000
_BLIND: Final = secrets.token_bytes(32)  # of this process


class Role(IntEnum):
    """What a caller may do. The order counts: a greater role may do all that a lesser role may."""

    READONLY = 1
    SESSION = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """The role as it is written in the file."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Callers:
    """The callers in a file, as of one reading; the digests are blinded."""

    role_by_digest: Mapping[bytes, Role] = field(repr=False)
    role_by_name: Mapping[str, Role]
    line_by_digest: Mapping[bytes, int] = field(default_factory=dict, repr=False)

    def role_of(self, key: str | None, certificate_names: Sequence[str]) -> Role | None:
        """Return a caller's role: of its key, or without a key the greatest of its certificate's names.

        None: the key is unknown, or no name is in the file. An unknown key is not made good by a certificate.
        """
        if key is not None:
            return self.role_by_digest.get(_blinded(digest_of(key)))
        roles = [
            role
            for pattern, role in self.role_by_name.items()
            if any(matches_name(pattern, name) for name in certificate_names)
        ]
        return max(roles, default=None)

    def line_of(self, key: str) -> int | None:
        """Return the number of a key's line, by which a log can name the key; None: the key is unknown.

        A part of the digest would name it too, but could be compared with digests of guessed keys.
        """
        return self.line_by_digest.get(_blinded(digest_of(key)))


def read(path: str) -> Callers:
    """Return the callers in a file.

    Raises:
        FilesUnusable: the file cannot be read, is refused by config/files.py, has an invalid line, or has no
            caller or too many.
    """
    try:
        lines = text_of(read_bytes(path, holds_secret=True)).splitlines()
    except FileRefused as exc:
        raise FilesUnusable(f"{path}: {exc}") from None
    by_digest: dict[bytes, Role] = {}
    by_name: dict[str, Role] = {}
    line_by_digest: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(
            r"(readonly|session|admin) (?:sha256:([0-9a-f]{64})|name:(\S+))", " ".join(words)
        )
        if match is None:
            raise FilesUnusable(
                f"{path}, line {number}: it is not a role (readonly, session, admin) and then "
                "sha256:… or name:…; `mnemosyned key` makes such lines"
            )
        role = Role[match[1].upper()]
        if match[2]:
            digest = _blinded(bytes.fromhex(match[2]))
            by_digest[digest] = role
            line_by_digest[digest] = number
        else:
            by_name[match[3]] = role
    if not 0 < len(by_digest) + len(by_name) <= _MAX_ENTRIES:
        raise FilesUnusable(f"{path}: it has no callers, or more than {_MAX_ENTRIES}")
    return Callers(role_by_digest=by_digest, role_by_name=by_name, line_by_digest=line_by_digest)


def digest_of(key: str) -> bytes:
    """Return the digest by which the file knows a key: SHA-256, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def _blinded(digest: bytes) -> bytes:
    # The time of a lookup depends on the digest. Blinded by a key of this process, a caller cannot know or
    # choose the digest that is looked up, so the time tells it nothing.
    return hashlib.blake2b(digest, key=_BLIND, digest_size=32).digest()


def new_key() -> str:
    """Return a new random key; its prefix lets tools that scan for secrets recognise it."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def line_of(key: str, role: Role) -> str:
    """Return the line of the file that gives a key its role; it holds the key's hash."""
    return f"{role.word} sha256:{digest_of(key).hex()}"
