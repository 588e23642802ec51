"""What may go wrong between nodes; the daemon translates it, no client sees it."""

from __future__ import annotations


class ClusterError(Exception):
    """Base of all errors between nodes; the text is for the operator."""


class PeerUnreachable(ClusterError):
    """The connection to a peer could not be made or broke; whether it did the work is unknown."""


class PeerSkipped(ClusterError):
    """A peer was not even asked: it is known to be away."""


class PeerTimeout(ClusterError):
    """A peer did not answer in time; whether it did the work is unknown."""


class PeerRefused(ClusterError):
    """A peer answered, and does not want us: another cluster, storage or secret."""


class MalformedPacket(ClusterError):
    """The bytes are no packet of this protocol."""


class UnauthenticatedPeer(ClusterError):
    """A call to the peer service that no peer has signed."""
