"""Whom to believe: calls between nodes are signed with the cluster's secret.

A signature covers the method, the time, a nonce and the body, so that it cannot be used again for
anything else; time-stamps outside a window of 30 s are refused, and nonces inside it are remembered.
That is each node's own memory: a body says for which node it is where it could do harm at another.
Messages on a stream are sealed: with what opened it, which is believed once, and their number on it.
Instead, a node may show a certificate with one of the names of nodes. Without a secret and without such
names only the own host is believed.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Final
from urllib.parse import unquote

from cluster.errors import UnauthenticatedPeer

METADATA_KEY: Final = "mnemosyned-peer"
_VERSION: Final = "v1"
_SEAL: Final = "v1 seal"  # no method's signature begins so
_WINDOW_MS: Final = 30_000
NONCE_BYTES: Final = 12
# More calls, streams being one each, than a node can answer in that time.
_MAX_NONCES: Final = 2**19


class PeerAuth:
    """Signs with the first secret, believes them all: two during a rotation; and certificates by name.

    A name such as `*.nodes.example` stands for one label more.
    """

    def __init__(self, secrets: Sequence[bytes], certificate_names: Sequence[str] = ()) -> None:
        self._names = certificate_names
        # Keyed once: that is half of the work on a short message.
        self._keyed = [hmac.new(secret, digestmod="sha256") for secret in secrets]
        # Two generations of a window each: a nonce is remembered for one to two windows.
        self._nonces: set[str] = set()
        self._older_nonces: set[str] = set()
        self._turned_ms = 0

    @property
    def reaches_elsewhere(self) -> bool:
        """Whether peers may be elsewhere than on this host."""
        return bool(self._keyed or self._names)

    def sign(self, method: str, body: bytes, *, now_ms: int, nonce: bytes) -> str:
        """Return the metadata value for a call; empty without a secret."""
        if not self._keyed:
            return ""
        nonce_text = nonce.hex()
        mac = _mac(self._keyed[0], method, str(now_ms), nonce_text, body)
        return f"{_VERSION} {now_ms} {nonce_text} {mac}"

    def knows(self, certificate_names: Sequence[str]) -> bool:
        """Tell whether a certificate with these names is a node's, so that nothing need be signed."""
        return any(matches_name(pattern, name) for pattern in self._names for name in certificate_names)

    def check(self, signature: str | None, method: str, body: bytes, *, peer: str, now_ms: int) -> None:
        """Return if a call without a node's certificate is a peer's.

        Raises:
            UnauthenticatedPeer: it is not; the text tells the operator of the calling node what to look at.
        """
        if not self._keyed:
            if self._names:
                raise UnauthenticatedPeer(
                    "the caller's certificate has none of this cluster's -tls.peer-names"
                )
            # grpcio writes [::1] in percent-encoding.
            if not is_loopback(unquote(peer).rpartition(":")[0].strip("[]")):
                raise UnauthenticatedPeer(
                    "this node has no -cluster.secret and takes peers from its own host only"
                )
            return
        version, sent_ms, nonce, mac = _parts(signature)
        if version != _VERSION:
            raise UnauthenticatedPeer("the call is signed in another way than this release knows")
        if not any(
            hmac.compare_digest(mac, _mac(keyed, method, sent_ms, nonce, body)) for keyed in self._keyed
        ):
            raise UnauthenticatedPeer("the call is not signed with this cluster's -cluster.secret")
        if abs(now_ms - int(sent_ms)) > _WINDOW_MS:
            raise UnauthenticatedPeer(
                "the call was signed more than 30 s ago, or the clocks are that far apart"
            )
        self._remember(nonce, now_ms)

    def stream_mac(self, opening: str) -> StreamMac:
        """Return the stream_mac of a stream that this signature opened; both ends make their own.

        One that a certificate opened has none: `StreamMac([])`.
        """
        return StreamMac([_begun(keyed, _SEAL, opening) for keyed in self._keyed])

    def _remember(self, nonce: str, now_ms: int) -> None:
        # A time-stamp may lie a window ahead and be good for two.
        if abs(now_ms - self._turned_ms) > 2 * _WINDOW_MS:
            self._older_nonces, self._nonces = self._nonces, set()
            self._turned_ms = now_ms
        if nonce in self._nonces or nonce in self._older_nonces:
            raise UnauthenticatedPeer("the call was made before")
        if len(self._nonces) >= _MAX_NONCES:
            raise UnauthenticatedPeer("there were too many calls in the last minute")
        self._nonces.add(nonce)


class StreamMac:
    """Shows of one message of a stream after another that it belongs there: whole, in place, and ours."""

    def __init__(self, begun: Sequence[hmac.HMAC]) -> None:
        self._begun = begun
        self._number = 0

    def seal(self, body: bytes) -> bytes:
        """Return what goes with the next message; empty without a secret."""
        number = self._take_number()
        return _seal(self._begun[0], number, body) if self._begun else b""

    def check(self, seal: bytes, body: bytes) -> None:
        """Return if this is the next message. Raises UnauthenticatedPeer."""
        number = self._take_number()
        if self._begun and not any(
            hmac.compare_digest(seal, _seal(begun, number, body)) for begun in self._begun
        ):
            raise UnauthenticatedPeer(
                "a message is not sealed with this cluster's -cluster.secret, or not the next one"
            )

    def _take_number(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(8, "big")


def _seal(begun: hmac.HMAC, number: bytes, body: bytes) -> bytes:
    mac = begun.copy()
    mac.update(number)
    mac.update(body)
    return mac.digest()


def _parts(signature: str | None) -> tuple[str, str, str, str]:
    # What is not ASCII has digits that are no digits, and cannot be compared in constant time.
    parts = signature.split(" ") if signature is not None and signature.isascii() else []
    if len(parts) != 4 or not parts[1].isdigit() or len(parts[1]) > 15:  # noqa: PLR2004  # ours
        raise UnauthenticatedPeer("the call is not signed; do both nodes have the same -cluster.secret?")
    return (parts[0], parts[1], parts[2], parts[3])


def _mac(keyed: hmac.HMAC, method: str, sent_ms: str, nonce: str, body: bytes) -> str:
    mac = _begun(keyed, _VERSION, method, sent_ms, nonce)
    mac.update(body)
    return mac.hexdigest()


def _begun(keyed: hmac.HMAC, *words: str) -> hmac.HMAC:
    mac = keyed.copy()
    mac.update("".join(f"{word}\n" for word in words).encode())
    return mac


def is_loopback(host: str) -> bool:
    """Tell whether a host is this one by its address, or by the usual name."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def matches_name(pattern: str, name: str) -> bool:
    """Tell whether a certificate's name is the pattern, or has one label more than its `*.domain`."""
    if not pattern.startswith("*."):
        return pattern.lower() == name.lower()
    label, _, rest = name.partition(".")
    return bool(label) and rest.lower() == pattern[2:].lower()
