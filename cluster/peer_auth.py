"""Which calls come from a node of this cluster: signatures with the cluster's secret, or certificates. Pure.

    call:    signature = HMAC(secret, "v1" method time nonce body)         in the metadata
    stream:  opening   = signature of an empty body                        in the metadata
             seal n    = HMAC(secret, "v1 seal" opening, n, batch)         with each message

What the secret gives:

- Only a node that knows the secret can call the Peer service.
- A call cannot be changed: the signature covers the method and the body.
- A call cannot be made twice at one node. Its time must be within 30 s, and its nonce is remembered for
  longer than that.
- On a stream, a message cannot be left out, repeated, reordered or moved to another stream: its seal covers
  its number and the opening, which is accepted once.

What the secret does not give:

- Secrecy. Without TLS, tokens and sessions cross the network in the clear.
- Signed answers. Without TLS, a machine on the path can change an answer.
- A name. Every node that knows the secret can speak for every other node.
- Protection against a replay at another node, because nonces are each node's own memory. Therefore a message
  that could do harm elsewhere names its callee (identity.py). A packet of gossip that is repeated is a claim
  that is not newer.

With mutual TLS a certificate with one of the nodes' names (`-tls.peer-names`) takes the place of a signature.
With neither a secret nor such names, only callers from this node's own host are accepted.
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
_SEAL: Final = "v1 seal"  # no method's signature begins so, so a seal cannot be used as a signature
_WINDOW_MS: Final = 30_000
NONCE_BYTES: Final = 12
# More calls than a node can answer in a window; a stream is one call, however many batches it carries.
_MAX_NONCES: Final = 2**19


class PeerAuth:
    """Signs with the first secret and accepts all of them: there are two while the secret is rotated.

    It accepts certificates by name. A name such as `*.nodes.example` stands for one label more.
    """

    def __init__(self, secrets: Sequence[bytes], certificate_names: Sequence[str] = ()) -> None:
        self._names = certificate_names
        # Keyed once: that is half of the work on a short message.
        self._keyed = [hmac.new(secret, digestmod="sha256") for secret in secrets]
        # Two sets, each in use for two windows and kept for as long again. A nonce is thus remembered for
        # longer than its time-stamp is valid, and a set is dropped as a whole.
        self._nonces: set[str] = set()
        self._older_nonces: set[str] = set()
        self._turned_ms = 0

    @property
    def reaches_elsewhere(self) -> bool:
        """Whether this node accepts peers on other hosts."""
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
            UnauthenticatedPeer: it is not; the text says which setting of the calling node to look at.
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
        # The time and the nonce are looked at after the MAC. Before it they are anyone's, and a caller
        # without the secret could fill the memory of nonces.
        if abs(now_ms - int(sent_ms)) > _WINDOW_MS:
            raise UnauthenticatedPeer(
                "the call was signed more than 30 s ago, or the clocks are that far apart"
            )
        self._remember(nonce, now_ms)

    def stream_mac(self, opening: str) -> StreamMac:
        """Return the seals of a stream that this signature opened; both ends make their own.

        A stream that a certificate opened has none: `StreamMac([])`.
        """
        return StreamMac([_begun(keyed, _SEAL, opening) for keyed in self._keyed])

    def _remember(self, nonce: str, now_ms: int) -> None:
        # A time-stamp may be a window ahead of this node's clock, and is then accepted for two windows.
        if abs(now_ms - self._turned_ms) > 2 * _WINDOW_MS:
            self._older_nonces, self._nonces = self._nonces, set()
            self._turned_ms = now_ms
        if nonce in self._nonces or nonce in self._older_nonces:
            raise UnauthenticatedPeer("the call was made before")
        if len(self._nonces) >= _MAX_NONCES:
            raise UnauthenticatedPeer("there were too many calls in the last minute")
        self._nonces.add(nonce)


class StreamMac:
    """Proves of each message of a stream that it is whole, the next one, and from a node of this cluster.

    Either end counts the messages. A message that fails `check` ends the stream, since the counts differ
    then.
    """

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
    # Text beyond ASCII has digits that `int` takes and that no node writes, and `compare_digest` refuses it.
    parts = signature.split(" ") if signature is not None and signature.isascii() else []
    if len(parts) != 4 or not parts[1].isdigit() or len(parts[1]) > 15:  # noqa: PLR2004  # ours
        raise UnauthenticatedPeer("the call is not signed; do both nodes have the same -cluster.secret?")
    return (parts[0], parts[1], parts[2], parts[3])


def _mac(keyed: hmac.HMAC, method: str, sent_ms: str, nonce: str, body: bytes) -> str:
    mac = _begun(keyed, _VERSION, method, sent_ms, nonce)
    mac.update(body)
    return mac.hexdigest()


def _begun(keyed: hmac.HMAC, *words: str) -> hmac.HMAC:
    # A line for each word: with the words run together, two different calls could have one signature.
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
