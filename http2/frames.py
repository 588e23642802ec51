"""Finds the frames in a stream of bytes, before the library parses them. Pure.

HTTP/2 cuts a connection into frames (RFC 9113, section 4):

    +----------+--------+---------+-------------+---------------------+
    | 3 bytes  | 1 byte | 1 byte  | 4 bytes     | payload             |
    | length   | type   | flags   | stream      | of `length` bytes   |
    +----------+--------+---------+-------------+---------------------+

Most chunks that arrive hold HEADERS and DATA alone, and are passed on as they are. The scanner is here for
the rest:

- Frames that cost work and bring no request are counted, by what they cost. So a peer that floods with them
  can be told from one that works. Among them is DATA so small that its frame is most of it, or with padding,
  which may be all of it.
- RST_STREAM is found, so that it can be kept from the library, which counts it against a limit of its own.
- The beginning of a frame that does not end is noticed, and a block of headers without its end.

The hot loop reads one word a frame: its three bytes of length and the byte of its type.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

FRAME_HEADER_BYTES: Final = 9
RST_STREAM_BYTES: Final = FRAME_HEADER_BYTES + 4
CLIENT_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
HAS_PRIORITY: Final = 0x20
PADDED: Final = 0x8

# DATA of fewer bytes counts as work without use, unless it ends its stream.
_SMALL_BYTES: Final = 256
_SMALL_WORD: Final = _SMALL_BYTES << 8
_BYTES_OF_COST: Final = 64  # a frame costs 1 more for so many bytes: SETTINGS may have thousands of entries
_UNUSUAL: Final = END_HEADERS | HAS_PRIORITY
_PRIORITY_BYTES: Final = 5
_MAX_FRAME_BYTES: Final = 16_384  # what our SETTINGS leave it at
_STREAM_BITS: Final = 0x7FFF_FFFF
_RST_STREAM_LENGTH: Final = b"\0\0\4"

# The three bytes of the length and the byte of the type, as one number; and the flags.
_word_and_flags = Struct(">IB").unpack_from
_stream = Struct(">I").unpack_from


class MalformedFrame(Exception):
    """A frame that RFC 9113 forbids and the library does not refuse; the text says which."""

    def __init__(self, text: str, *, is_too_large: bool = False) -> None:
        """`is_too_large`: the frame's size is the error, which has a code of its own."""
        super().__init__(text)
        self.is_too_large = is_too_large


class Frame(NamedTuple):
    """One whole frame; `data` is all of it."""

    kind: int
    stream_id: int
    data: bytes


class FrameScanner:
    """Follows the frames of one direction of a connection, chunk by chunk."""

    __slots__ = (
        "_skip",
        "_tail",
        "began_at",
        "begun_requests",
        "block_is_open",
        "overhead",
        "partial_since_s",
        "requests",
        "resets",
    )

    def __init__(self, *, preface_bytes: int) -> None:
        """`preface_bytes` come before the first frame."""
        self.overhead = (
            0  # cost of frames that brought no request, since the reader of this number set it to 0
        )
        self.begun_requests = 0  # 1 if the last chunk may begin with the end of HEADERS
        self.requests = 0  # HEADERS in the last chunk, and that one
        self.resets: list[int] = []  # where in the last chunk a RST_STREAM begins
        self.began_at = 0  # where in the last chunk its first frame begins
        self.block_is_open = False  # the next frame must be CONTINUATION
        self.partial_since_s: float | None = None  # since when a frame or a block of headers lacks its end
        self._skip = preface_bytes  # bytes until the next frame begins
        self._tail = b""  # the beginning of a frame, too short to tell what it is

    # One loop without calls: it runs for each frame.
    def scan(self, chunk: bytes, now_s: float) -> bytes:  # noqa: C901, PLR0915
        """Return the bytes that can be passed on: all but a tail, which begins the next chunk.

        Raises:
            MalformedFrame: a frame is forbidden, and the library would not notice.
        """
        if self._tail:
            chunk, self._tail = self._tail + chunk, b""
        if self.resets:
            self.resets = []
        had_open_block = self.block_is_open
        at, end = self._skip, len(chunk)
        self.began_at = at
        self.begun_requests = requests = 1 if at or had_open_block else 0
        last = end - FRAME_HEADER_BYTES
        while at <= last:
            word, flags = _word_and_flags(chunk, at)
            kind = word & 0xFF
            if kind == DATA:
                if (word < _SMALL_WORD or flags & PADDED) and not flags & END_STREAM:
                    self.overhead += 1
            elif kind == HEADERS:
                if flags & _UNUSUAL != END_HEADERS and not self._take_unusual_headers(chunk, at, flags):
                    break
                requests += 1
            elif not self._take_other(kind, flags, chunk, at):
                break
            at += FRAME_HEADER_BYTES + (word >> 8)
        self.requests = requests
        if at < end:
            # Less than the header of a frame, or less than `_is_readable` asks for.
            chunk, self._tail = chunk[:at], chunk[at:]
            end = at
        self._skip = at - end
        if not (self._skip or self._tail or self.block_is_open):
            self.partial_since_s = None
        elif self.partial_since_s is None or (at > self.began_at and not had_open_block):
            # What is partial now began in this chunk.
            self.partial_since_s = now_s
        return chunk

    def _take_unusual_headers(self, chunk: bytes, at: int, flags: int) -> bool:
        """Take HEADERS with a priority or without their end; False: more of them must come first."""
        if flags & HAS_PRIORITY:
            padding_bytes = 1 if flags & PADDED else 0
            if not _is_readable(chunk, at, padding_bytes + _PRIORITY_BYTES):
                return False
            _check_dependency(chunk, at, padding_bytes)
        self.block_is_open = not flags & END_HEADERS
        return True

    def _take_other(self, kind: int, flags: int, chunk: bytes, at: int) -> bool:
        """Take a frame that is neither DATA nor HEADERS; False: more of it must come first."""
        if kind == CONTINUATION:
            self.block_is_open = not flags & END_HEADERS
        elif kind == PRIORITY:
            if not _is_readable(chunk, at, _PRIORITY_BYTES):
                return False
            _check_priority(chunk, at)
        elif kind == RST_STREAM and not self.block_is_open and chunk[at : at + 3] == _RST_STREAM_LENGTH:
            if at + RST_STREAM_BYTES > len(chunk):
                return False
            self.resets.append(at)
        self.overhead += 1 + (_word_and_flags(chunk, at)[0] >> 8) // _BYTES_OF_COST
        return True

    def cut(self, part: bytes, at: int) -> tuple[bytes, list[Frame]]:
        """Cut the last part of what `scan` returned into whole frames, the first of which begins at `at`.

        Returns what is before that, and the frames. A frame without its end is kept, to begin the next chunk.

        Raises:
            MalformedFrame: that frame is larger than any may be, so its end is not waited for.
        """
        before, frames, end = part[:at], [], len(part)
        while at + FRAME_HEADER_BYTES <= end:
            word, stream_id = _word_and_flags(part, at)[0], _stream(part, at + 5)[0] & _STREAM_BITS
            after = at + FRAME_HEADER_BYTES + (word >> 8)
            if after > end:
                self._keep(part[at:])
                break
            frames.append(Frame(word & 0xFF, stream_id, part[at:after]))
            at = after
        return before, frames

    def _keep(self, partial: bytes) -> None:
        word, flags = _word_and_flags(partial)
        if word >> 8 > _MAX_FRAME_BYTES:
            raise MalformedFrame("a frame is too large", is_too_large=True)
        kind = word & 0xFF
        if kind != HEADERS and (
            kind != DATA or ((word < _SMALL_WORD or flags & PADDED) and not flags & END_STREAM)
        ):
            # It is counted once more when the rest of it has come.
            self.overhead -= 1 if kind == DATA else 1 + (word >> 8) // _BYTES_OF_COST
        self._tail, self._skip = partial + self._tail, 0


def reset_at(chunk: bytes, at: int) -> int:
    """Return the stream of the RST_STREAM that begins there."""
    stream_id: int = _stream(chunk, at + 5)[0] & _STREAM_BITS
    return stream_id


def _is_readable(chunk: bytes, at: int, wanted_bytes: int) -> bool:
    """Tell whether so much of a payload is there; a frame shorter than that has all it will have."""
    size_bytes: int = min(_word_and_flags(chunk, at)[0] >> 8, wanted_bytes)
    return at + FRAME_HEADER_BYTES + size_bytes <= len(chunk)


def _check_priority(chunk: bytes, at: int) -> None:
    if _stream(chunk, at + 5)[0] & _STREAM_BITS == 0:
        raise MalformedFrame("PRIORITY on stream 0")
    _check_dependency(chunk, at, 0)


def _check_dependency(chunk: bytes, at: int, padding_bytes: int) -> None:
    if _word_and_flags(chunk, at)[0] >> 8 < padding_bytes + _PRIORITY_BYTES:
        # The library refuses it for its size.
        return
    dependency = _stream(chunk, at + FRAME_HEADER_BYTES + padding_bytes)[0] & _STREAM_BITS
    if dependency == _stream(chunk, at + 5)[0] & _STREAM_BITS:
        raise MalformedFrame("a stream depends on itself")
