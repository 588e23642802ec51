"""The file of `mnemosyned export`: sessions of any engine as text, one line each. Pure.

    {"header":{"format":1,"kind":"mnemosyned sessions","hmac_key_ids":[],"engine":"postgres",…}}
    {"session":{"access_token":"…","subject_id":"u","expire_at":"2030-01-01T00:00:00.000000Z","bag":{"k":"v"}}}
    {"session":{…}}
    {"end":{"sessions":2,"sha256":"…","expired":0,"damaged":0}}

- JSON Lines, ASCII only, so that every tool for text reads it: `jq`, `wc -l`, `sort`.
- Each line is an object with one member, which names what the line is. A later format may have other lines
  and other members. A reader refuses what it does not know: to ignore it would lose a part of a session.
- The sessions are in the sequence of the bytes of their stored keys, each key once.
- A session whose key is a hash has `access_token_hmac` in place of `access_token`: what List shows. The
  header has the ids of the HMAC keys that made the hashes. An id reveals nothing of its key.
- A bag is an object of texts. If other bytes than those of `bag.encode` are stored, as by the Go daemon,
  they are in `bag_base64`, so that they come out as they were.
- The last line has the number of sessions and the SHA-256 of all bytes before it. A file without it was cut.

What is optional, and left out if it is empty: subject_client, refresh_token, bag.

An error names a line and what is wrong there, and shows nothing of its content.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from mnemosyned.errors import CorruptSession
from mnemosyned.sessions import bag, damage, token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.model import DamagedSession, Session

FORMAT: Final = 1
_KIND: Final = "mnemosyned sessions"
# A bag of MAX_BAG_BYTES takes six characters for a byte at worst, and the other fields less than 1 MB.
MAX_LINE_BYTES: Final = 32 * 1024 * 1024
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_TEXTS: Final = ("subject_client", "refresh_token")
_MEMBERS: Final = frozenset(
    {"access_token", "access_token_hmac", "subject_id", "expire_at", "bag", "bag_base64", *_TEXTS}
)
_Object: TypeAlias = dict[str, Any]  # as JSON has it


class BadExport(Exception):
    """The file is not what `mnemosyned export` writes; the text is one line, without a secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first line says of the file."""

    engine: str  # from which the sessions come
    version: str  # of the mnemosyned that wrote it
    exported_at_us: int  # on the storage's clock
    # Of the HMAC keys that had hashed tokens when the export began; empty: no token was hashed.
    hmac_key_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the last line says besides the checksum."""

    sessions: int  # in the file
    expired: int = 0  # left out
    damaged: int = 0  # left out


class Writer:
    """Makes the lines, and the checksum over them."""

    def __init__(self) -> None:
        self.sessions = 0
        self._digest = hashlib.sha256()

    def header(self, header: Header) -> str:
        """Return the first line."""
        content = {
            "format": FORMAT,
            "kind": _KIND,
            "engine": header.engine,
            "version": header.version,
            "exported_at": _time(header.exported_at_us),
            "hmac_key_ids": list(header.hmac_key_ids),
        }
        return self._added(_line("header", content))

    def session(self, session: Session) -> str:
        """Return the line of a session, whose `access_token` is its stored key."""
        self.sessions += 1
        return self._added(_line("session", _content(session)))

    def end(self, *, expired: int, damaged: int) -> str:
        """Return the last line."""
        checksum = self._digest.hexdigest()
        return _line(
            "end", {"sessions": self.sessions, "sha256": checksum, "expired": expired, "damaged": damaged}
        )

    def _added(self, line: str) -> str:
        self._digest.update(line.encode())
        return line


@dataclass(slots=True)
class Reader:
    """Reads the lines of a file, from the first to the last."""

    limits: BagLimits  # of stored bags
    header: Header | None = None
    summary: Summary | None = None
    _count: int = 0
    _number: int = 0  # of the line
    _last_key: bytes = field(default=b"", repr=False)
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def sessions(self, lines: Iterable[bytes]) -> Iterator[Session]:
        """Yield the sessions; `header` is known with the first of them, and `summary` after the last.

        A line over MAX_LINE_BYTES may come in parts: the first of them is refused.

        Raises:
            BadExport: a line is none, or not the one that must be there; or the end is missing.
        """
        for line in lines:
            self._number += 1
            if self.summary is not None:
                raise self._bad("something follows the last line")
            session = self._read(line)
            if session is not None:
                yield session
        if self.summary is None:
            raise BadExport(f"the file is cut off after line {self._number}: its last line is missing")

    def _read(self, line: bytes) -> Session | None:
        kind, content = self._opened(line)
        if (kind == "header") != (self._number == 1):
            raise self._bad("it is no file of mnemosyned export" if self._number == 1 else "a second header")
        if kind == "end":
            self.summary = self._end(content)
            return None
        self._digest.update(line)
        if kind == "header":
            self.header = self._header(content)
            return None
        if kind != "session":
            raise self._bad("a kind of line that this version does not know")
        self._count += 1
        return self._session(content)

    def _opened(self, line: bytes) -> tuple[str, _Object]:
        if not line.endswith(b"\n"):
            cut = "it is too long" if len(line) >= MAX_LINE_BYTES else "the file is cut off here"
            raise self._bad(cut)
        try:
            ((kind, content),) = json.loads(line.decode("ascii")).items()
        except (ValueError, AttributeError, RecursionError):
            raise self._bad(
                "it is no file of mnemosyned export" if self._number == 1 else "it is not one JSON object"
            ) from None
        if not isinstance(content, dict):
            raise self._bad("it has no content")
        return kind, content

    def _header(self, content: _Object) -> Header:
        if content.get("kind") != _KIND or not isinstance(content.get("format"), int):
            raise self._bad("it is no file of mnemosyned export")
        if content["format"] != FORMAT:
            raise BadExport(
                f"the file has format {content['format']}, and this version reads format {FORMAT} only"
            )
        ids = content.get("hmac_key_ids")
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise self._bad("hmac_key_ids is not a list of texts")
        return Header(
            engine=self._text(content, "engine"),
            version=self._text(content, "version"),
            exported_at_us=self._instant(content, "exported_at"),
            hmac_key_ids=tuple(ids),
        )

    def _end(self, content: _Object) -> Summary:
        numbers = [self._count_in(content, name) for name in ("sessions", "expired", "damaged")]
        if numbers[0] != self._count or content.get("sha256") != self._digest.hexdigest():
            raise BadExport("the file was changed or is damaged: its checksum is another one")
        return Summary(sessions=numbers[0], expired=numbers[1], damaged=numbers[2])

    def _session(self, content: _Object) -> Session:
        if content.keys() - _MEMBERS:
            raise self._bad("the session has a member that this version does not know")
        session = Session(
            access_token=self._key(content),
            subject_id=self._text(content, "subject_id"),
            subject_client=self._text(content, "subject_client", ""),
            refresh_token=self._text(content, "refresh_token", ""),
            bag=self._bag(content),
            expires_at_us=self._instant(content, "expire_at"),
        )
        try:
            found = damage.nameable(session)
            damage.checked(session, self.limits)
        except CorruptSession as exc:
            raise self._bad(damage.reason_of(exc)) from None
        if isinstance(found, DamagedSession):
            raise self._bad(found.reason)
        key = session.access_token.encode()
        if key <= self._last_key:
            raise self._bad("the session is not behind the one before it, by the bytes of its key")
        self._last_key = key
        return session

    def _key(self, content: _Object) -> str:
        if "access_token_hmac" not in content:
            return self._text(content, "access_token")
        shown = self._text(content, "access_token_hmac")
        if "access_token" in content or not token_hash.is_session_id(shown):
            raise self._bad("access_token_hmac is none, or stands beside a token")
        return token_hash.from_session_id(shown)

    def _bag(self, content: _Object) -> bytes:
        try:
            if "bag_base64" in content:
                if "bag" in content:
                    raise self._bad("two bags")
                return b64decode(self._text(content, "bag_base64"), validate=True)
            values = content.get("bag", {})
            if not isinstance(values, dict) or not all(isinstance(one, str) for one in values.values()):
                raise self._bad("bag is not an object of texts")
            return bag.encode(values)
        except ValueError:
            raise self._bad("its bag cannot be read") from None

    def _text(self, content: _Object, name: str, default: str | None = None) -> str:
        text = content.get(name, default)
        if not isinstance(text, str):
            raise self._bad(f"{name} is missing, or not a text")
        # JSON can write halves of characters.
        if not text.isascii() and not _is_unicode(text):
            raise self._bad(f"{name} is not Unicode")
        return text

    def _count_in(self, content: _Object, name: str) -> int:
        count = content.get(name)
        if type(count) is not int or count < 0:
            raise self._bad(f"{name} is no number of sessions")
        return count

    def _instant(self, content: _Object, name: str) -> int:
        try:
            instant = datetime.fromisoformat(self._text(content, name))
            return (instant - _EPOCH) // _MICROSECOND
        except (ValueError, TypeError, OverflowError):
            raise self._bad(f"{name} is no time with its zone") from None

    def _bad(self, what: str) -> BadExport:
        return BadExport(f"line {self._number}: {what}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _line(kind: str, content: _Object) -> str:
    return json.dumps({kind: content}, separators=(",", ":")) + "\n"


def _content(session: Session) -> _Object:
    key = session.access_token
    content: _Object = (
        {"access_token_hmac": token_hash.session_id(key)}
        if token_hash.is_hashed(key)
        else {"access_token": key}
    )
    content |= {"subject_id": session.subject_id, "expire_at": _time(session.expires_at_us)}
    content |= {name: getattr(session, name) for name in _TEXTS if getattr(session, name)}
    if session.bag:
        content |= _bag_content(session.bag)
    return content


def _bag_content(stored: bytes) -> _Object:
    if not bag.is_gob(stored):
        values = bag.decode(stored, _ANY)
        if bag.encode(values) == stored:
            return {"bag": values}
    return {"bag_base64": b64encode(stored).decode()}


# The session was checked before: what is asked here is only how to write its bag.
_ANY: Final = BagLimits(entries=10**9, key_bytes=10**9, value_bytes=10**9)


def _time(us: int) -> str:
    # No later than a text can hold: PostgreSQL has infinity.
    instant = _EPOCH + timedelta(microseconds=min(us, damage.MAX_EXPIRY_US))
    return instant.isoformat(timespec="microseconds").replace("+00:00", "Z")
