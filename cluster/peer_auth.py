"""Which processes are nodes of this cluster: proofs with the cluster's secret, or certificates. Pure.

Both ends of a connection prove that they know the secret, and every call and every answer is authenticated:

    caller, process A                                             callee, process B
      |                                                              |
      |-- Hello(A)   signature = MAC(secret, "hello", A, time, nonce, body) -->|
      |<- B          proof = MAC(secret, "welcome", signature, B) -------------|
      |                                                              |
      |        key of the pair = MAC(secret, "pair", A, B), known to both      |
      |                                                              |
      |-- call       signature = MAC(key, "call", method, A, time, nonce, body) ->|
      |<- answer     seal = MAC(key, "answer", signature, answer) -------------|
      |                                                              |
      |-- stream     opening = signature of a call with an empty body -------->|
      |-- batch n    seal = MAC(key, "batch", opening, n, batch) ------------->|
      |<- answers n  seal = MAC(key, "answers", opening, n, answers) ----------|

A and B are random numbers that each process makes when it starts. Nothing else is sent before Hello, and the
secret itself is never sent.

What the secret gives:

- Authentication of both sides. A caller that does not know the secret is refused. An answer without a proof
  counts as no answer, so a process that took over an address can neither answer nor become a member.
- Integrity. A signature covers the method and the body, and a seal covers the answer and its question.
- No replay. The time of a call must be within 30 s, and its nonce is remembered for longer than that. The key
  of the pair belongs to two processes: a recorded call is refused by every other process, also by the one
  that is started in the callee's place. On a stream, no message can be left out, repeated or reordered.

What the secret does not give:

- Secrecy. Without TLS, tokens and sessions cross the network in the clear.
- A name. Every node that knows the secret can speak for every other node.

A certificate with one of the nodes' names (`-tls.peer-names`) takes the place of a proof, for callers and for
callees. With neither a secret nor such names, peers are on this node's own host; that is for development.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Final
from urllib.parse import unquote

from cluster.errors import UnauthenticatedPeer

METADATA_KEY: Final = "mnemosyned-peer"
HELLO: Final = "Hello"
_VERSION: Final = "v2"
_WINDOW_MS: Final = 30_000
NONCE_BYTES: Final = 12
PROCESS_BYTES: Final = 16
# More calls than a node can answer in a window; a stream is one call, however many batches it carries.
_MAX_NONCES: Final = 2**19
# Keys of pairs that a callee keeps, so that it need not derive them for each call.
_MAX_KEPT_KEYS: Final = 2048
_NO_PROOF: Final = "it does not prove that it knows this cluster's -cluster.secret"


class PeerAuth:
    """Proves with the first secret and accepts all of them: there are two while the secret is rotated.

    It accepts certificates by name. A name such as `*.nodes.example` stands for one label more.
    """

    def __init__(
        self,
        secrets: Sequence[bytes],
        certificate_names: Sequence[str] = (),
        *,
        process: bytes,
        trusted_peer: str | None = None,
    ) -> None:
        """`process` is PROCESS_BYTES at random, made when the process starts.

        A call of `trusted_peer` needs no proof: it comes in a way that only other processes of this daemon
        can take.
        """
        self._trusted_peer = trusted_peer
        self.process = process
        self._own = process.hex()
        self._names = certificate_names
        # Keyed once: that is half of the work on a short message.
        self._secrets = [hmac.new(secret, digestmod="sha256") for secret in secrets]
        # By the caller's process: its key, of the secret with which it has proved itself.
        self._keys: dict[str, hmac.HMAC] = {}
        # Two sets, each in use for two windows and kept for as long again. A nonce is thus remembered for
        # longer than its time-stamp is valid, and a set is dropped as a whole.
        self._nonces: set[str] = set()
        self._older_nonces: set[str] = set()
        self._turned_ms = 0

    def renew(self, secrets: Sequence[bytes]) -> None:
        """Accept these secrets from now on, and no others; the first one signs.

        Calls on open connections are accepted as long as the secret is, with which they were opened.

        Raises:
            ValueError: this node would begin or cease to use secrets. Open connections could not follow.
        """
        if bool(secrets) != self.has_secret:
            raise ValueError("a node with a secret cannot go on without one, nor the reverse")
        self._secrets = [hmac.new(secret, digestmod="sha256") for secret in secrets]
        self._keys.clear()

    @property
    def has_secret(self) -> bool:
        """Whether this node can prove itself, and demand a proof."""
        return bool(self._secrets)

    @property
    def demands_proof(self) -> bool:
        """Whether peers prove themselves in one way or the other; else they are on this node's own host."""
        return bool(self._secrets or self._names)

    def knows(self, certificate_names: Sequence[str]) -> bool:
        """Tell whether a certificate with these names is a node's."""
        return any(matches_name(pattern, name) for pattern in self._names for name in certificate_names)

    # The caller's side.

    def greeting(self, body: bytes, *, now_ms: int, nonce: bytes) -> str:
        """Return the metadata value for a Hello; there is a secret."""
        return _signature(self._secrets[0], ("hello", HELLO, self._own), body, now_ms=now_ms, nonce=nonce)

    def key_for(self, process: bytes, proof: bytes, *, greeting: str) -> PeerKey:
        """Return the key of the pair, after the answer to a greeting. Raises UnauthenticatedPeer."""
        callee = process.hex()
        if not hmac.compare_digest(proof, _mac(self._secrets[0], "welcome", greeting, callee)):
            raise UnauthenticatedPeer(_NO_PROOF)
        return PeerKey(_pair(self._secrets[0], self._own, callee), self._own)

    def objection_to_callee(self, certificate_names: Sequence[str], host: str) -> str:
        """Return why a callee must not be called that has not proved that it knows the secret.

        Empty if it may be: by its certificate, or on this node's own host where no proof is demanded.
        """
        if self.knows(certificate_names):
            return ""
        if self._secrets:
            return _NO_PROOF
        if self._names:
            return "its certificate has none of this cluster's -tls.peer-names"
        return "" if is_loopback(host) else "this node has no -cluster.secret and calls its own host only"

    # The callee's side.

    def check(
        self,
        signature: str | None,
        method: str,
        body: bytes,
        *,
        certificate_names: Sequence[str],
        peer: str,
        now_ms: int,
    ) -> PeerKey:
        """Return the key with which to answer a call, if the call is a peer's.

        Raises:
            UnauthenticatedPeer: it is not; the text says which setting of the calling node to look at.
        """
        if peer == self._trusted_peer:
            return NO_KEY
        is_certified = self.knows(certificate_names)
        if not self._secrets or (is_certified and signature is None):
            if not is_certified:
                self._check_unproved(peer)
            return NO_KEY
        try:
            caller, keyed = self._verified(signature, method, body, now_ms)
        except UnauthenticatedPeer:
            if is_certified:
                return NO_KEY
            raise
        return PeerKey(keyed, caller)

    def proof(self, greeting: str, key: PeerKey) -> bytes:
        """Return this process's answer to a greeting that `check` has accepted with this key.

        Empty without a secret: the caller must know this process by its certificate, or by its host.
        """
        secret = key.keyed
        return b"" if secret is None else _mac(secret, "welcome", greeting, self._own)

    def _check_unproved(self, peer: str) -> None:
        if self._names:
            raise UnauthenticatedPeer("the caller's certificate has none of this cluster's -tls.peer-names")
        # grpcio writes [::1] in percent-encoding.
        if not is_loopback(unquote(peer).rpartition(":")[0].strip("[]")):
            raise UnauthenticatedPeer(
                "this node has no -cluster.secret and takes peers from its own host only"
            )

    def _verified(
        self, signature: str | None, method: str, body: bytes, now_ms: int
    ) -> tuple[str, hmac.HMAC]:
        """Return the calling process, and the key that proves the answer: a pair's, or for Hello a secret."""
        caller, sent_ms, nonce, mac = _parts(signature)
        is_hello = method == HELLO
        label = "hello" if is_hello else "call"
        for keyed in self._secrets if is_hello else self._keys_of(caller):
            wanted = _mac(keyed, label, method, caller, sent_ms, nonce, body=body)
            if hmac.compare_digest(mac, wanted.hex()):
                break
        else:
            raise UnauthenticatedPeer(
                "the call is not signed with this cluster's -cluster.secret, or for another process"
            )
        # The time and the nonce are looked at after the MAC. Before it they are anyone's, and a caller
        # without the secret could fill the memory of nonces.
        if abs(now_ms - int(sent_ms)) > _WINDOW_MS:
            raise UnauthenticatedPeer(
                "the call was signed more than 30 s ago, or the clocks are that far apart"
            )
        self._remember(nonce, now_ms)
        if not is_hello and self._keys.get(caller) is not keyed:
            if len(self._keys) >= _MAX_KEPT_KEYS and caller not in self._keys:
                del self._keys[next(iter(self._keys))]
            self._keys[caller] = keyed
        return caller, keyed

    def _keys_of(self, caller: str) -> Iterator[hmac.HMAC]:
        """Yield the key that proved the caller's last call, and then those of all secrets.

        In a rotation, a caller has connections with either secret for a moment.
        """
        kept = self._keys.get(caller)
        if kept is not None:
            yield kept
        if kept is None or len(self._secrets) > 1:
            for secret in self._secrets:
                yield _pair(secret, caller, self._own)

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


class PeerKey:
    """The key of two processes: the caller signs its calls with it, the callee seals its answers.

    Without a secret there is no key (`NO_KEY`), and nothing is signed or sealed.
    """

    __slots__ = ("_caller", "keyed")

    def __init__(self, keyed: hmac.HMAC | None, caller: str) -> None:
        self.keyed = keyed
        self._caller = caller

    def sign(self, method: str, body: bytes, *, now_ms: int, nonce: bytes) -> str:
        """Return the metadata value for a call; empty without a key."""
        if self.keyed is None:
            return ""
        return _signature(self.keyed, ("call", method, self._caller), body, now_ms=now_ms, nonce=nonce)

    def seal(self, signature: str, answer: bytes) -> bytes:
        """Return what proves an answer to the call with this signature; empty without a key."""
        return b"" if self.keyed is None else _mac(self.keyed, "answer", signature, body=answer)

    def check_answer(self, signature: str, answer: bytes, seal: bytes) -> None:
        """Return if the answer is the callee's, to the call with this signature.

        Raises:
            UnauthenticatedPeer: it is not.
        """
        if self.keyed is not None and not hmac.compare_digest(seal, self.seal(signature, answer)):
            raise UnauthenticatedPeer("its answer is not sealed with this cluster's -cluster.secret")

    def stream_macs(self, opening: str) -> tuple[StreamMac, StreamMac]:
        """Return the seals of the batches and of the answers of a stream that this signature opened."""
        if self.keyed is None:
            return StreamMac(None), StreamMac(None)
        return (
            StreamMac(_begun(self.keyed, "batch", opening)),
            StreamMac(_begun(self.keyed, "answers", opening)),
        )


NO_KEY: Final = PeerKey(None, "")


class StreamMac:
    """Proves of each message in one direction of a stream that it is whole, the next one, and from the peer.

    Each end counts the messages. A message that fails `check` ends the stream, since the counts differ then.
    """

    def __init__(self, begun: hmac.HMAC | None) -> None:
        self._begun = begun
        self._number = 0

    def seal(self, body: bytes) -> bytes:
        """Return what goes with the next message; empty without a key."""
        if self._begun is None:
            return b""
        self._number += 1
        mac = self._begun.copy()
        mac.update(self._number.to_bytes(8, "big"))
        mac.update(body)
        return mac.digest()

    def check(self, seal: bytes, body: bytes) -> None:
        """Return if this is the next message. Raises UnauthenticatedPeer."""
        if self._begun is not None and not hmac.compare_digest(seal, self.seal(body)):
            raise UnauthenticatedPeer(
                "a message is not sealed with this cluster's -cluster.secret, or not the next one"
            )


def _parts(signature: str | None) -> tuple[str, str, str, str]:
    # Text beyond ASCII has digits that `int` takes and that no node writes, and `compare_digest` refuses it.
    parts = signature.split(" ") if signature is not None and signature.isascii() else []
    if len(parts) != 5 or not parts[2].isdigit() or len(parts[2]) > 15:  # noqa: PLR2004  # ours
        raise UnauthenticatedPeer("the call is not signed; do both nodes have the same -cluster.secret?")
    version, caller, sent_ms, nonce, mac = parts
    if version != _VERSION:
        raise UnauthenticatedPeer("the call is signed in another way than this release knows")
    return caller, sent_ms, nonce, mac


def _signature(
    keyed: hmac.HMAC, call: tuple[str, str, str], body: bytes, *, now_ms: int, nonce: bytes
) -> str:
    """Return the metadata value; `call` is the kind of MAC, the method, and the calling process."""
    when = (str(now_ms), nonce.hex())
    return " ".join((_VERSION, call[2], *when, _mac(keyed, *call, *when, body=body).hex()))


def _pair(secret: hmac.HMAC, caller: str, callee: str) -> hmac.HMAC:
    return hmac.new(_mac(secret, "pair", caller, callee), digestmod="sha256")


def _mac(keyed: hmac.HMAC, *words: str, body: bytes = b"") -> bytes:
    mac = _begun(keyed, *words)
    mac.update(body)
    return mac.digest()


def _begun(keyed: hmac.HMAC, *words: str) -> hmac.HMAC:
    # A line for each word: with the words run together, two different calls could have one MAC. The first
    # word says what the MAC is of, so that no MAC can be used as one of another kind.
    mac = keyed.copy()
    mac.update("\n".join((_VERSION, *words, "")).encode())
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
