"""Which copies a node may serve, and what a write must wait for: leases in the store. Pure.

The promise: once a write is acknowledged, no node serves what was there before it, whatever fails. Nodes that
cannot reach one another still share the store, so the store is the referee: it has one row for each node.

    node H, which may have copies          store                      node W, which has written
      |-- renew: its number, its ring ---->|  H's row                   |
      |<- all rows; its epoch -------------|                            |
      |   serves copies for LEASE          |<- renew, all rows ---------|  who may have copies?
      |                                    |                            |-- tell H, if rings differ --> H
      |                                    |<- bar H: epoch + 1 --------|  no answer within TELL
      |-- renew ------------------------->|                            |
      |<- another epoch: drop all copies --|                            |
      |-- renew: seen = that epoch ------->|<- look: seen? -------------|  or LEASE has passed
      |                                    |                            |-- acknowledge

Times are of one node's own clock, in microseconds; it counts the time in which the machine is suspended. The
store's clock is never used. Clocks may run two percent too fast or too slow (`stretched`).

The rules
---------
1.  A row has: name, instance, number, ring, epoch, seen. *Renew* stores the own row and returns all rows,
    every PERIOD and at once when `ring` or `seen` has changed. `instance` is one process. `number` grows with
    each renewal, and the store refuses one that is not newer: a renewal that was held up must not put an
    older ring back. Another instance is refused while the row changes. It may replace a row that it has seen
    unchanged for LEASE: two daemons of one name never both have a lease. `seen` is never above `epoch`: a
    renewal that brings a greater one raises the epoch over it, and a new row begins above it.
2.  A lease is valid until the moment *before* its last answered renewal was sent, plus LEASE.
3.  If the answer shows another epoch, or the lease had run out: drop every copy, close every fill, forget
    loads under way; then renew at once with `seen`.
4.  A node that registers, or registers again after a lapse, serves no copies until ACTIVATION after the
    answer. A token that a change of the ring has given to it has no copy until ACTIVATION after the answer
    that published the ring (view.py). A token that it owned before and still owns keeps its copy.
5.  A copy is served or kept only if, when the call arrives, the lease is valid, the node is not barred, and
    it owns the token by every ring since the last one that had been published for ACTIVATION. Otherwise the
    store answers.
6.  A write is acknowledged after its commit and 7, or 8 to 10. If the last answered renewal was sent more
    than LEASE ago, renew first. If that fails, the write's outcome is unknown to its caller.
7.  If this node may serve copies of the token, has published the ring that it routes by, and each row that
    has not lapsed shows that ring or none: drop the own copy, acknowledge. Nothing is sent.
8.  Otherwise tell each node that has not lapsed and is not barred. Each drops its copy. Only the process that
    the row names can confirm it.
9.  Who has not confirmed within TELL is barred: its epoch is raised. Without a row it has resigned, or the
    store is a copy that lacks the row: the rows of a renewal that is sent after this tell, by 14.
10. Wait until its row shows `seen`, or until no lease from before the bar can be valid.
11. A node that meets a new epoch is barred for BAR from then on, and until a renewal that it sends after
    that is answered. Who barred it, or saw the epoch rise, knows that: until BAR after the last moment at
    which the bar had not happened, no node need tell it or wait.
    Another `base` is no bar: the node has made its row again.
12. While a barred node cannot be told, it is barred again before that time is over.
13. Leaving: serve no copies, delete the row.
14. The answer carries the store's identity. Another one counts as a lapse. A write then waits for LEASE too,
    because rows of other nodes may be missing in a copy of the store that was promoted. The same holds when
    the own row had to be made again, which its base shows: rows were removed, and bars with them. A process
    that starts within ACTIVATION of a promotion cannot know what the identity was. It relies on a copy that
    has a row of each node with a lease, however old: that of a node that has just registered may be missing.
15. A row without a ring is that of a node that serves no copies: it joins, or has no peers' port yet.
16. A row that did not change for LEASE, between the answer of one renewal and the sending of a later one,
    has lapsed.

Mirrors
-------
A node that gets a call for another node's token may keep the copy that comes with the owner's answer, and
serve it itself from then on: a mirror. What is said of copies above holds for the owner's own, and 2 to 4 and
8 to 14 hold for mirrors too. (`mirrors.py` has the grants, and who may serve.)

17. The owner grants a mirror with the answer to a call that has come from the node. It does so only from a
    copy that it may serve to that call by 5. In the step in which it reads the copy it records the grant, and
    remembers it for as long as the mirror may be kept on the node's clock, also when its own lease lapses.
18. A mirror is served or kept only if, when the call arrives, the lease is valid and the node is not barred;
    and by every ring since the last one that had been published for ACTIVATION this node is an owner, and the
    granting node owns the token; and the last answered renewal shows the granting process in its row. A node
    that owns nothing by a ring shows no ring, and need not be told. Nor is a mirror served when the time is
    over for which it was granted, counted from before the call was sent to the owner.
19. A mirror enters by a fill that was opened before the call was sent; 3 and 8 close it as any other.
20. A write that is settled by 7 drops the own copy first. If there is a grant of the token, it tells the
    nodes that have one, as by 8 to 12: those nodes alone.
21. A write that is settled by 8 does so twice, the second time by rows that are recent then. When the first
    round is over, no owner has an older copy. But a node that has dropped its mirror could have got it once
    more, from an owner that was told later. Between the rounds this node drops its own mirror, too.

Copies of own writes
--------------------
22. A node may keep a copy of a session as the store's answer to its own write shows it, in the step in which
    it drops the older one. It enters by a fill that was opened before the store was asked. That is allowed if
    5 held when the call arrived, and the lease is valid when the fill is opened: a write may wait for others
    in between. The right to the token is that of the call. A ring that gave the token away meanwhile counts,
    though another one gave it back. Any other write to the token that ends here closes the fill, as 3 and 8
    do.

Why it holds
------------
A write on a token commits at c; W decides at d >= c that it is settled, and acknowledges. Suppose that H
serves a copy from before c to a call that arrives after d. H has a lease by a renewal r, sent after
d - LEASE, since it is valid after d. W decided by rows of a renewal that W sent after d - LEASE.

(i)   W told everybody. H confirmed, so it has dropped its copy, and its open fills put nothing; what it
      loads later begins after c. Or H was barred at some b before d. If r's answer shows the bar, H dropped
      everything before r counted, and served nothing for BAR. If not, r committed before the bar. Then W has
      waited until every lease from before the bar had run out, so that of r too; or until it saw `seen`,
      which H sent after it had dropped everything.
(ii)  W saw H's row with a ring by which H does not own the token. H owns it by a ring that it published after
      W's rows were read, which was after d - LEASE. It serves the token ACTIVATION later, so after d, from
      a copy that was loaded after that.
(iii) W saw no row of H, one without a ring, or one that had lapsed: H registered, or published, after W's
      rows were read; as (ii).
(iv)  W took H for barred at some moment after c. Then H served nothing at that moment, or will not after the
      wait of 10, and what it loads when the bar is over it loads after c.

Mirrors. Suppose that H serves a mirror, granted by the process O, from before c to a call that arrives after
d. Again H has a lease by a renewal r, sent after d - LEASE.

(v)   W settled by 21. When its second round began, at d' > c, no owner served an older copy any more, to any
      call that came later. With "d'" in the place of "c", (i), (iii) and (iv) say that what H serves it loads
      after d': O granted it to a call that came later.
(vi)  W settled by 7, and H's row showed W's ring. If H routes by that ring when it serves, or has it among
      those of 18, the granting node is W by name. O is not a former process of W: the lease by which W
      decided began ACTIVATION after the answer that showed its row to itself, which was before d. So r was
      sent after W's row was there, and its answer shows it. O is W then: it had recorded the grant, and told
      H or barred it, as in (i). A grant that W makes after it has dropped its own copy is of a later one. If
      H has left the ring behind, it has published another one after W's rows were read, and ACTIVATION later,
      after d, it has a fill by that ring alone.
(vii) W settled by 7, and saw no row of H, one without a ring, or one that had lapsed: as (iii). What H serves
      it asks for after d; the owner that answers serves no older copy then, by (i) to (iv).

Copies of own writes. What the store answers it had at a moment after the fill was opened. So the copy is as
one that was loaded then, by a call that 5 allows: the lease was valid, and the node has owned the token ever
since the call arrived. A write from before that moment is in the copy. A write from after it also ends after
it, here or on another node: it closes the fill, or drops the copy.

A fill that was opened before H was told brings nothing: the answer with the grant may come later. That which
was opened before a ring, or before another process of the granting node was seen, brings nothing that is
served: the ring, or the process, is compared for the whole time since the fill began.

A process that stands still between a decision and what follows does no harm: a copy that is served was
allowed when its call arrived, and an acknowledgement that comes late promises nothing about earlier reads.

Where this differs from its first design, which compared the store's clock with itself: a store whose clock
is set forward no longer ends leases early. And bars have no end in the store, so no clock decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from cluster.node_row import Barred, NodeRow, Renewal, Renewed

_MS: Final = 1000
LEASE_US: Final = 1500 * _MS
PERIOD_US: Final = 400 * _MS
ACTIVATION_US: Final = 1600 * _MS
TELL_US: Final = 300 * _MS
BAR_US: Final = 4000 * _MS
LOOK_US: Final = 100 * _MS  # between two looks at the rows of barred nodes
FORGET_US: Final = 600_000 * _MS  # a row that lapsed so long ago is removed

# Three renewals may fail before a lease runs out.
assert 3 * PERIOD_US < LEASE_US


def stretched(duration_us: int) -> int:
    """Return how long to wait, so that on another node's clock so much has passed: each may be 2 % wrong."""
    return duration_us * 21 // 20


# What has just begun on another node is over when `stretched` says so; a new owner waits at least as long.
assert stretched(LEASE_US) <= ACTIVATION_US


class Answer(NamedTuple):
    """What the answer to a renewal means for the node that sent it."""

    is_renewed: bool  # False: the store refused it, or it is older than another one
    must_drop: bool = False  # every copy, before anything else; then renew at once
    why: str = ""  # it must: lapsed, barred or replaced


class Wait(NamedTuple):
    """For what a write waits at a barred node (rule 10)."""

    name: str
    instance: int  # 0: it had no row
    epoch: int
    until_us: int


# Tells whether a node may have copies of what was written, by its name.
MayHave: TypeAlias = Callable[[str], bool]


def _may_have(_name: str) -> bool:
    return True


@dataclass(slots=True)
class _Peer:
    """Another node, as the answers to this node's renewals have shown it."""

    row: NodeRow
    since_us: int  # when this version of the row was first seen
    has_lapsed: bool = False
    barred_until_us: int = 0  # no later than the end of its bar
    barred_epoch: int = 0
    gone_by_us: int = 0  # by then no lease from before the bar is valid

    def serves_nothing(self, now_us: int) -> bool:
        """Whether it is barred, and has no lease from before the bar."""
        if now_us >= self.barred_until_us:
            return False
        return self.row.seen >= self.barred_epoch or now_us >= self.gone_by_us

    def bar(self, epoch: int, until_us: int, gone_by_us: int, *, received_us: int) -> None:
        """Take note of a bar that happened before `received_us`."""
        if self.serves_nothing(received_us):
            # The former bar lasted until this one, so there was no lease in between.
            gone_by_us = min(self.gone_by_us, received_us)
        self.barred_until_us = max(self.barred_until_us, until_us)
        self.barred_epoch, self.gone_by_us = epoch, gone_by_us


@dataclass(slots=True)
class Lease:
    """This node's lease, and what it knows of the others'."""

    name: str
    instance: int
    ring: str = ""  # by which this node routes
    # A copy may be served to a call that arrives before this: the one comparison of the hot path.
    until_us: int = 0
    published: str = ""  # the present ring, once a renewal with it was answered
    barred_until_us: int = 0
    conflict: NodeRow | None = None  # the row of another process with this node's name
    agrees: bool = False  # rule 7: all rows show the ring by which this node routes
    losses: int = 0  # of other processes: those whose rows lapsed, or that another process has replaced
    _number: int = 0
    _routed_since: int = 0  # the renewals above this number have the present ring
    _sent_us: int | None = None  # of the last answered renewal; None: never registered
    _rows_sent_us: int | None = None  # of the renewal that showed the rows
    _rows_number: int = 0
    _epoch: int = 0
    _active_from_us: int = 0
    _complete_from_us: int = 0  # the rows may lack nodes until then (rule 14)
    _identity: str = ""
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _rival: _Peer | None = None

    def renewal(self) -> Renewal:
        """Return the next renewal."""
        self._number += 1
        rival = self._rival
        replaced = rival.row.version if rival is not None and rival.has_lapsed else (0, 0)
        return Renewal(self.name, self.instance, self._number, self.ring, self._epoch, replaced)

    def answered(self, renewal: Renewal, answer: Renewed, *, sent_us: int, received_us: int) -> Answer:
        """Take the answer to a renewal in; `sent_us` is from before it was sent."""
        if renewal.number < self._rows_number:
            return Answer(is_renewed=False)
        is_replaced = self._identity not in ("", answer.identity)
        self._identity, self._rows_number = answer.identity, renewal.number
        if is_replaced:
            self._complete_from_us = received_us + stretched(LEASE_US)
            # What is known of others is of the former store.
            self._peers, self._rival = {}, None
        own = self._look(answer.rows, sent_us, received_us)
        if own is None or own.version != (self.instance, renewal.number):
            self._meet_rival(own, sent_us, received_us)
            self._compare()
            return Answer(is_renewed=False)
        self._rival = self.conflict = None
        why = self._renewed(own, received_us, is_replaced=is_replaced)
        self._sent_us = sent_us
        if renewal.number > self._routed_since:
            self.published = renewal.ring
        # Who bars a barred node again relies on it: no renewal from before the second bar begins a lease.
        is_idle = received_us < self._active_from_us or sent_us < self.barred_until_us
        self.until_us = 0 if is_idle else sent_us + LEASE_US
        self._compare()
        return Answer(is_renewed=True, must_drop=bool(why), why=why)

    def _renewed(self, own: NodeRow, received_us: int, *, is_replaced: bool) -> str:
        """Return why every copy must be dropped; empty: it need not."""
        why = ""
        if own.epoch != self._epoch and own.epoch == own.base and self._sent_us is not None:
            # Made again by this renewal: the row was removed, perhaps with a bar, and perhaps others.
            is_replaced = True
            self._complete_from_us = received_us + stretched(LEASE_US)
        if self._sent_us is None or received_us >= self._sent_us + LEASE_US or is_replaced:
            self._active_from_us = received_us + ACTIVATION_US
            why = "replaced" if is_replaced else "lapsed"
        if own.epoch != self._epoch:
            # Who has barred this node counts on BAR.
            if own.epoch != own.base:
                self.barred_until_us = received_us + stretched(BAR_US)
                why = why or "barred"
            self._epoch = own.epoch
        return why

    def _look(self, rows: Iterable[NodeRow], sent_us: int, received_us: int) -> NodeRow | None:
        """Compare the rows with those of before; return the own one."""
        own, peers = None, {}
        for row in rows:
            if row.name == self.name:
                own = row
            else:
                peers[row.name] = self._peer(self._peers.get(row.name), row, sent_us, received_us)
        self._peers = peers
        self._rows_sent_us = sent_us
        return own

    def _peer(self, old: _Peer | None, row: NodeRow, sent_us: int, received_us: int) -> _Peer:
        if old is not None and not old.has_lapsed and old.row.instance != row.instance:
            self.losses += 1
        if old is None or (old.row.instance, old.row.base) != (row.instance, row.base):
            # Also the row that a node has made again, since the store had lost it: that raised its epoch too.
            return _Peer(row, received_us)
        if row.version != old.row.version:
            old.since_us, old.has_lapsed = received_us, False
        elif sent_us - old.since_us >= stretched(LEASE_US) and not old.has_lapsed:
            old.has_lapsed = True
            self.losses += 1
        known_epoch = max(old.row.epoch, old.barred_epoch)
        if row.epoch > known_epoch:
            # Another node has barred it, after the last rows were read.
            assert self._rows_sent_us is not None
            gone_by_us = received_us + stretched(LEASE_US)
            old.bar(row.epoch, self._rows_sent_us + BAR_US, gone_by_us, received_us=received_us)
        old.row = row
        return old

    def _meet_rival(self, own: NodeRow | None, sent_us: int, received_us: int) -> None:
        if own is None or own.instance == self.instance:
            # Its own row, with a later number: an answer out of turn.
            return
        rival = self._rival
        if rival is None or rival.row.version != own.version:
            self._rival = _Peer(own, received_us)
        else:
            rival.row = own
            rival.has_lapsed = sent_us - rival.since_us >= stretched(LEASE_US)
        self.conflict = own

    def _compare(self) -> None:
        self.agrees = (
            self.ring != ""
            and self.ring == self.published
            and self._rival is None
            and all(peer.has_lapsed or peer.row.ring in ("", self.ring) for peer in self._peers.values())
        )

    def route_by(self, ring: str) -> None:
        """Take another ring; the shell must renew at once. Empty: serve no copies."""
        # A renewal under way does not publish it, also if that has a ring of the same nodes from before.
        self.ring, self.published, self._routed_since = ring, "", self._number
        self._compare()

    def resign(self) -> None:
        """Serve nothing any more; the row may be deleted after this."""
        self.ring, self.until_us, self._sent_us = "", 0, None
        self._active_from_us = self.barred_until_us = 0
        self._compare()

    def is_valid(self, now_us: int) -> bool:
        """Tell whether a copy may be served to a call that arrives now."""
        return now_us < self.until_us

    def reason(self, now_us: int) -> str:
        """Return in one word why no copy may be served: conflict, lapsed, barred or registering."""
        if now_us < self.until_us:
            return ""
        if self.conflict is not None:
            return "conflict"
        if self._sent_us is None or now_us >= self._sent_us + LEASE_US:
            return "lapsed"
        return "barred" if now_us < self.barred_until_us else "registering"

    def age_us(self, now_us: int) -> int | None:
        """Return the time since the last answered renewal was sent; None: there was none."""
        return None if self._sent_us is None else now_us - self._sent_us

    @property
    def processes(self) -> dict[str, int]:
        """The process of each other node that has a row, by name."""
        return {name: peer.row.instance for name, peer in self._peers.items()}

    @property
    def rows(self) -> list[NodeRow]:
        """What the store has of the other nodes."""
        return [peer.row for peer in self._peers.values()]

    def shown(self, now_us: int) -> dict[str, str]:
        """Return one word for each node with a row: valid, barred, lapsed, or none for one without a ring."""
        # A copy, made in one step: other threads read it.
        words = {name: _word(peer, now_us) for name, peer in list(self._peers.items())}
        reason = self.reason(now_us)
        words[self.name] = "valid" if not reason else "none" if not self.ring else reason
        return words

    def living(self) -> list[str]:
        """Return the other nodes that have not lapsed, whether or not they serve copies."""
        return [name for name, peer in self._peers.items() if not peer.has_lapsed]

    def serving(self) -> list[str]:
        """Return the other nodes that route by a ring, and have not lapsed."""
        return [name for name, peer in self._peers.items() if not peer.has_lapsed and peer.row.ring]

    # A write.

    def knows_others(self, now_us: int) -> bool:
        """Tell whether the rows are recent enough to decide by (rule 6)."""
        return self._rows_sent_us is not None and now_us < self._rows_sent_us + LEASE_US

    def complete_from_us(self) -> int:
        """Return from when on the rows have every node that may have copies (rule 14)."""
        return self._complete_from_us

    def holders(self, now_us: int, may_have: MayHave = _may_have) -> dict[str, int]:
        """Return the nodes that may have copies and must be told, with their processes (rule 8)."""
        return {
            name: peer.row.instance
            for name, peer in self._peers.items()
            if _may_serve(peer, now_us) and may_have(name)
        }

    def instance_of(self, name: str) -> int:
        """Return the process of a node; 0: it has no row."""
        peer = self._peers.get(name)
        return 0 if peer is None else peer.row.instance

    def rival(self) -> str:
        """Return this node's own name if another process has it and may have copies; it cannot be told."""
        rival = self._rival
        return "" if rival is None or rival.has_lapsed or not rival.row.ring else self.name

    def waits(self, now_us: int, may_have: MayHave = _may_have) -> list[Wait]:
        """Return for what to wait at nodes that others, or earlier writes, have barred; see `holders`."""
        return [
            Wait(name, peer.row.instance, peer.barred_epoch, peer.gone_by_us)
            for name, peer in self._peers.items()
            if now_us < peer.barred_until_us
            and not peer.has_lapsed
            and not peer.serves_nothing(now_us)
            and may_have(name)
        ]

    def barred(self, name: str, bar: Barred | None, *, sent_us: int, received_us: int) -> Wait:
        """Take the answer to a bar in, None if the node has no row; return for what to wait."""
        gone_by_us = received_us + stretched(LEASE_US)
        if bar is None:
            return Wait(name, 0, 0, gone_by_us)
        peer = self._rival if name == self.name else self._peers.get(name)
        if self._identity not in ("", bar.identity):
            # Not the store of the rows: nothing that is known of the node can be compared.
            return Wait(name, bar.instance, bar.epoch, gone_by_us)
        if peer is not None and peer.row.instance == bar.instance:
            if peer.row.number == bar.number:
                # The last renewal without the bar was sent before it was first seen.
                gone_by_us = peer.since_us + stretched(LEASE_US)
            if bar.epoch > peer.barred_epoch:
                peer.bar(bar.epoch, sent_us + BAR_US, gone_by_us, received_us=received_us)
        return Wait(name, bar.instance, bar.epoch, gone_by_us)

    def is_over(self, wait: Wait, now_us: int) -> bool:
        """Tell whether a wait is over."""
        if now_us >= wait.until_us:
            return True
        if wait.instance == 0:
            # It had no row. Later rows are of the same store, or `complete_from_us` waits for the others.
            barred_us = wait.until_us - stretched(LEASE_US)
            return self._rows_sent_us is not None and self._rows_sent_us >= barred_us
        peer = self._rival if wait.name == self.name else self._peers.get(wait.name)
        if peer is None or peer.row.instance != wait.instance:
            # It has resigned, or another process has replaced its lapsed row.
            return self.knows_others(now_us)
        return peer.row.seen >= wait.epoch

    def bar_ends_us(self, name: str) -> int:
        """Return until when a node is known to be barred, 0 if it is not, or has lapsed."""
        peer = self._peers.get(name)
        return 0 if peer is None or peer.has_lapsed else peer.barred_until_us

    def forgotten(self, now_us: int) -> list[NodeRow]:
        """Return the rows of nodes that ended long ago without resigning."""
        return [
            peer.row
            for peer in self._peers.values()
            if peer.has_lapsed and now_us - peer.since_us > FORGET_US
        ]


def _may_serve(peer: _Peer, now_us: int) -> bool:
    return not peer.has_lapsed and peer.row.ring != "" and now_us >= peer.barred_until_us


def _word(peer: _Peer, now_us: int) -> str:
    if peer.has_lapsed:
        return "lapsed"
    if not peer.row.ring:
        return "none"
    return "barred" if now_us < peer.barred_until_us else "valid"
