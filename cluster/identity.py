"""What two nodes must have in common to be of one cluster: the handshake that goes with each message.

A wrong seed, or one address that two clusters used in turn, must not merge two clusters: nodes that store
sessions in different tables would answer for each other's tokens. Therefore every message between nodes
carries an `Origin`, and the receiver compares it with its own Identity before it looks at anything else. This
guards against mistakes. Against attackers there is peer_auth.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.peerpb import peer_pb2 as pb

# Sent, and compared by no release yet: a later one may need to know which messages an older peer understands.
PROTOCOL: Final = 1
_MAX_SHOWN: Final = 100  # characters of what a foreign node sent, in a message for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The cluster's label, and a fingerprint of the table in which its sessions are stored."""

    label: str
    storage_fingerprint: bytes

    def message(self, callee: str = "") -> pb.Origin:
        """Return it as it goes over the wire to the node of this name, or to any node."""
        return pb.Origin(
            cluster_label=self.label,
            storage_fingerprint=self.storage_fingerprint,
            protocol=PROTOCOL,
            callee=callee,
        )

    def objection(self, origin: pb.Origin) -> str:
        """Return why a node with this origin does not belong to this cluster; empty if it does."""
        if origin.cluster_label != self.label:
            theirs = origin.cluster_label[:_MAX_SHOWN]
            return f"the cluster's label is {self.label!r} on one side and {theirs!r} on the other"
        if origin.storage_fingerprint != self.storage_fingerprint:
            return "the two nodes store sessions in different tables or databases"
        return ""

    def objection_to_call(self, origin: pb.Origin, me: str) -> str:
        """Return why a call with this origin must not be answered by the node `me`; empty if it may be.

        A call names the node that it is for, because another node may have taken over an address. Only the
        owner of a token may answer a call for it.
        """
        if origin.callee != me:
            return f"this node is {me}, and the call is for {origin.callee[:_MAX_SHOWN] or 'no node'}"
        return self.objection(origin)
