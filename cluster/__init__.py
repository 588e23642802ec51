"""Nodes that find one another, agree on an owner for each token, and forward calls to it.

This package knows neither sessions nor storage. The daemon tells it which clock all nodes share and what to
do with an invalidation, and asks it where a call belongs.

    client -> entry node -> router.py (daemon) -> routing.route(view, token) -> Local:   answer here
                                                                             -> Forward: forward.py -> owner
    other nodes <-> gossip.py <-> swim.py -> table.py -> view_change.py -> view.py --------^

The pure modules decide: they have no clock, no socket, no task and no log, and their tests run in no time.
The shell around them performs, on asyncio. Read the pure modules first, in this sequence:

1. `member`: a claim about a node, its version, and the packets that carry claims.
2. `table`: all claims that a node holds, and the sequence in which it probes members.
3. `suspicion`, `dissemination`: how long a suspect has left; which updates go into a packet.
4. `swim`: the membership protocol. It opens with the theory.
5. `ring`, `view`, `view_change`, `routing`: from members to owners, and from a token to a place.
6. `node_row`, `lease`, `mirrors`: which copies a node may serve, and what a write waits for.
7. `breaker`: what a node remembers of a peer that does not answer.
8. `peer_auth`, `identity`, `introductions`, `addresses`, `wire`, `errors`: what is believed, and how it looks
   as bytes.
9. `timing`: the constants that depend on one another, with their inequalities.

Then the shell:

10. `connection`, `responses`, `channel`, `channel_stream`: gRPC calls to one address, on http2/.
    `signing`, `peer_failures`, `forward_stream`, `peers`: connections, calls and streams to other nodes.
    `discovery`: from seeds to addresses. `failure_signs`: from lost connections to refused dials.
11. `core_timer`: the clock of `swim`. `gossip`: its network, and the current view. `event_log`: its lines in
    the log.
12. `call_queue`, `owner`, `forward`: forwarded calls and invalidations, in batches, with deadlines.

Which file answers which question:

- Which node owns a token? `ring.Ring.owner`. Which nodes are on the ring? `member.Member.is_routable`.
- Is a call answered here, from the cache or past it, or forwarded? `routing.route`.
- Which nodes are alive, and when is a node declared dead? `swim`, with times in `swim.Settings` and
  `suspicion`.
- What does a node do when it starts, joins, leaves or is killed? `gossip.Gossip`.
- Which of two processes with one name keeps the name? `swim`, `_meet_rival`.
- Where is a call forwarded? `forward.Forwarder.ask`. Where is it received? `mnemosyned/api/peer.py`.
- Where is a deadline carried over a hop? `forward`, `ask` writes it into the item;
  `mnemosyned/api/forwarded.py` reads it.
- When is a peer not asked? `forward.Forwarder.may_ask`, for the reasons in `breaker`.
- Which peers may hold a copy of a session? `lease.Lease.holders`. Where are they told to drop it?
  `forward.Forwarder.tell`.
- What happens to copies while the ring changes? `view_change`, and `former` of `view.View`.
- When does a process become a member? `introductions`. Which addresses are dialled? `addresses`.
- What does the cluster's secret protect? `peer_auth`. Why does a node refuse another one? `identity`.
- How are nodes of two releases compatible? `wire`, and `proto/peer.proto`.
"""
