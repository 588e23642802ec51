"""The times and counts of this package that depend on one another, and what must hold between them. Pure.

Each group states its inequality in words and then asserts it, so that a changed number fails at the first
import and not in a production cluster. A constant that no other module depends on stands in its own module.
The unit is the end of a name: `_S` for seconds.
"""

from __future__ import annotations

from typing import Final

from cluster.lease import TELL_US

# Membership (swim.py): one probe.
#
#     0 s           PROBE_TIMEOUT_S                PROBE_INTERVAL_S
#     |---- PING ----|---- PING_REQUEST to helpers ----| suspect
#                    |-- NACK_SHARE * PROBE_TIMEOUT_S --| the helpers' NACK arrives before that
PROBE_INTERVAL_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 0.5
NACK_SHARE: Final = 0.8

# A NACK that arrives after the end of the probe would count as missing, against a healthy prober.
assert NACK_SHARE * PROBE_TIMEOUT_S < PROBE_INTERVAL_S - PROBE_TIMEOUT_S

# A suspect whose host refused connections is dead after this.
REFUSED_SUSPICION_S: Final = 0.5
GOSSIP_INTERVAL_S: Final = 0.2

# A suspect that is alive hears of its suspicion in one gossip round, and is heard in the next.
assert 2 * GOSSIP_INTERVAL_S < REFUSED_SUSPICION_S

# Forwarding (forward.py, owner.py, breaker.py). A forwarded call gets half of what its caller has left, and
# at most this. The other half is for the storage, which answers if the owner does not.
TRY_S: Final = 0.25
# A forwarded call for which there is nothing to fall back on gets what its caller has left, and at most this.
MOST_TRY_S: Final = 10.0
# Such a call is answered this much earlier by the peer: a time-out of its work is no time-out of the peer.
ANSWER_S: Final = 0.03
# A time-out of a shorter try says more about the caller's deadline than about the peer: no breaker counts it.
LEAST_TRY_S: Final = 0.05
# The caller waits this much longer than the stream. The stream then notices the time-out itself and puts its
# connection under suspicion.
STREAM_GRACE_S: Final = 0.02
# An open breaker lets one trial through each time that this has passed, ...
HALF_OPEN_S: Final = 1.0
# ... and peers are looked after this often then; while no breaker is open, each HALF_OPEN_S.
TRIAL_PERIOD_S: Final = 0.25

assert STREAM_GRACE_S < LEAST_TRY_S < TRY_S < MOST_TRY_S
assert ANSWER_S < TRY_S
assert TRIAL_PERIOD_S <= HALF_OPEN_S

# Telling (forward.py). A write waits at most this for each node that must drop a copy, which is then barred.
TELL_S: Final = TELL_US / 1_000_000

# Connections (peers.py). A call for gossip waits this long for its answer, and longer on an unhealthy node.
GOSSIP_CALL_S: Final = 1.0
# If a call times out and nothing came on its connection for this long, the connection is replaced.
SILENCE_S: Final = 0.9
# A connection of a certificate that was replaced has this long to finish its calls.
CHANNEL_GRACE_S: Final = 2.0

# One slow forwarded call costs no connection; one unanswered packet does.
assert max(TRY_S + STREAM_GRACE_S, TELL_S) < SILENCE_S < GOSSIP_CALL_S
# No call of a healthy node is cut off. On an unhealthy node a packet may be, which is as good as lost.
assert max(TRY_S + STREAM_GRACE_S, TELL_S, GOSSIP_CALL_S) < CHANNEL_GRACE_S
