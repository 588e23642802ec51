"""What all ports of a daemon say together."""

from __future__ import annotations

from collections import Counter

from mnemosyned.ports import _AllConnections
from mnemosyned.transport.engine import ConnectionStats


def test_the_connections_of_both_ports_are_shown_as_one_sum() -> None:
    clients = ConnectionStats(open=3, unsent_bytes=5, ended=Counter({"client": 2, "flood": 1}))
    peers = ConnectionStats(open=4, accept_failures=Counter({"EMFILE": 1}), ended=Counter({"client": 1}))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in _AllConnections([clients, peers]).collect()
        for sample in family.samples
    }

    assert samples["grpc_server_connections",] == 7
    assert samples["grpc_server_unsent_bytes",] == 5
    assert samples["grpc_server_connections_ended_total", "client"] == 3
    assert samples["grpc_server_connections_ended_total", "flood"] == 1
    assert samples["grpc_server_accept_failures_total", "EMFILE"] == 1
    assert clients.ended == {"client": 2, "flood": 1}
