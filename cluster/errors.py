"""What may go wrong between nodes; the daemon translates it, no client sees it.

After an error of a forwarded call the entry node asks the storage itself. For a write it matters whether the
owner may have done the work, or may still be doing it. After PeerSkipped it is certain that the owner has not
seen the call. After every other error that is unknown.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of all errors between nodes; the text is for people who run the nodes."""


class PeerUnreachable(ClusterError):
    """The connection to a peer could not be made or broke; whether it did the work is unknown."""


class PeerSkipped(ClusterError):
    """A peer was not even asked: it is known not to answer, has missed changes, or too many calls wait."""


class PeerTimeout(ClusterError):
    """A peer did not answer in time; whether it did the work is unknown."""


class PeerRefused(ClusterError):
    """A peer answered, and refuses this node: it has another cluster label, storage or secret."""


class PeerUnproven(ClusterError):
    """A process answered in the peer's place, or the peer itself, without a proof: as no answer."""


class MalformedPacket(ClusterError):
    """The bytes are no valid message of this protocol."""


class UnauthenticatedPeer(ClusterError):
    """A call, or an answer, that no node of this cluster has made."""
