"""Who may call what: the file of `-auth.keys`.

A line names a role, and who has it: `sha256:` and the hash of an API key, or `name:` and a name in a
client's certificate, also `*.domain`. What follows a `#` is a comment.

A key is 32 random bytes, so one round of SHA-256 is as good as many: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

from cluster.peer_auth import matches_name
from mnemosyned.security.file_reloader import FilesUnusable

_KEY_BYTES: Final = 32
_PREFIX: Final = "mnk_"
MIN_KEY_LENGTH: Final = 32
_MAX_ENTRIES: Final = 10_000
_BLIND: Final = secrets.token_bytes(32)


class Role(IntEnum):
    """What a caller may do; a greater one may do all that a lesser one may."""

    READONLY = 1
    SESSION = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """As the file says it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Callers:
    """The callers that a file knows."""

    role_by_digest: Mapping[bytes, Role] = field(repr=False)
    role_by_name: Mapping[str, Role]

    def role_of(self, key: str | None, certificate_names: Sequence[str]) -> Role | None:
        """Return a caller's role: of the key it sent, or else the greatest of its certificate's names."""
        if key is not None:
            return self.role_by_digest.get(_blinded(digest_of(key)))
        roles = [
            role
            for pattern, role in self.role_by_name.items()
            if any(matches_name(pattern, name) for name in certificate_names)
        ]
        return max(roles, default=None)


def read(path: str) -> Callers:
    """Return the callers in a file.

    Raises:
        FilesUnusable: it cannot be read, has a line that means nothing, or nobody in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise FilesUnusable(f"{path}: {reason}") from None
    by_digest: dict[bytes, Role] = {}
    by_name: dict[str, Role] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        # Never the line itself: whoever forgot to hash a key would find it in the log.
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
            by_digest[_blinded(bytes.fromhex(match[2]))] = role
        else:
            by_name[match[3]] = role
    if not 0 < len(by_digest) + len(by_name) <= _MAX_ENTRIES:
        raise FilesUnusable(f"{path}: it names nobody, or more than {_MAX_ENTRIES}")
    return Callers(role_by_digest=by_digest, role_by_name=by_name)


def digest_of(key: str) -> bytes:
    """Return what the file keeps of a key."""
    return hashlib.sha256(key.encode()).digest()


def _blinded(digest: bytes) -> bytes:
    # How long it takes to find or to miss one tells nothing: nobody knows which digest becomes which.
    return hashlib.blake2b(digest, key=_BLIND, digest_size=32).digest()


def new_key() -> str:
    """Return a key that nobody has."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def line_of(key: str, role: Role) -> str:
    """Return the line that gives a key its role."""
    return f"{role.word} sha256:{digest_of(key).hex()}"
