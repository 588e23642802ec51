from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import peer_auth as peer_auths
from cluster.errors import UnauthenticatedPeer
from cluster.peer_auth import PeerAuth, StreamMac

SECRET, NEXT = b"the-secret-of-today", b"the-secret-of-tomorrow"
NOW_MS = 1_800_000_000_000
NONCE = bytes(12)
PEER = "192.0.2.1:4000"


def signed(trust: PeerAuth, *, method: str = "Forward", body: bytes = b"body", at_ms: int = NOW_MS) -> str:
    return trust.sign(method, body, now_ms=at_ms, nonce=NONCE)


def check(trust: PeerAuth, signature: str | None, *, method: str = "Forward", body: bytes = b"body") -> None:
    trust.check(signature, method, body, peer=PEER, now_ms=NOW_MS)


def test_what_one_node_signs_another_believes() -> None:
    check(PeerAuth([SECRET]), signed(PeerAuth([SECRET])))


@pytest.mark.parametrize("changed", [{"method": "Leave"}, {"body": b"another"}])
def test_a_signature_is_good_for_its_own_method_and_body_only(changed: dict[str, str]) -> None:
    with pytest.raises(UnauthenticatedPeer, match=r"not signed with this cluster's -cluster.secret"):
        check(PeerAuth([SECRET]), signed(PeerAuth([SECRET])), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [1, 2, 3])
def test_a_signature_with_another_time_nonce_or_code_is_refused(field: int) -> None:
    parts = signed(PeerAuth([SECRET])).split(" ")
    parts[field] = str(int(parts[field], 16) + 1).zfill(len(parts[field]))

    with pytest.raises(UnauthenticatedPeer):
        check(PeerAuth([SECRET]), " ".join(parts))


def test_another_secret_is_refused_and_not_told() -> None:
    with pytest.raises(UnauthenticatedPeer) as caught:
        check(PeerAuth([SECRET]), signed(PeerAuth([NEXT])))

    assert SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize("off_ms", [-30_001, 30_001])
def test_a_signature_of_another_time_is_refused(off_ms: int) -> None:
    with pytest.raises(UnauthenticatedPeer, match="30 s"):
        check(PeerAuth([SECRET]), signed(PeerAuth([SECRET]), at_ms=NOW_MS + off_ms))


@pytest.mark.parametrize("off_ms", [-30_000, 30_000])
def test_clocks_may_differ_by_half_a_minute(off_ms: int) -> None:
    check(PeerAuth([SECRET]), signed(PeerAuth([SECRET]), at_ms=NOW_MS + off_ms))


@pytest.mark.parametrize("later_ms", [0, 29_999, 59_999])
def test_a_call_is_believed_once(later_ms: int) -> None:
    trust = PeerAuth([SECRET])
    signature = signed(trust, at_ms=NOW_MS + 30_000)
    check(trust, signature)

    with pytest.raises(UnauthenticatedPeer, match="made before"):
        trust.check(signature, "Forward", b"body", peer=PEER, now_ms=NOW_MS + later_ms)


def test_nonces_are_forgotten_when_their_time_stamps_are_too_old_anyway() -> None:
    trust = PeerAuth([SECRET])
    for minute in range(5):
        now_ms = NOW_MS + minute * 60_001
        for number in range(10):
            nonce = (10 * minute + number).to_bytes(12, "big")
            signature = trust.sign("Gossip", b"", now_ms=now_ms, nonce=nonce)
            trust.check(signature, "Gossip", b"", peer=PEER, now_ms=now_ms)

    assert len(trust._nonces) + len(trust._older_nonces) == 20


def test_nonces_are_forgotten_too_when_the_clock_has_gone_back() -> None:
    trust = PeerAuth([SECRET])
    for number in range(5):
        now_ms = NOW_MS - number * 60_001
        signature = trust.sign("Gossip", b"", now_ms=now_ms, nonce=number.to_bytes(12, "big"))
        trust.check(signature, "Gossip", b"", peer=PEER, now_ms=now_ms)

    assert len(trust._nonces) + len(trust._older_nonces) == 2


def test_two_secrets_are_believed_in_a_rotation_and_the_first_signs() -> None:
    old, both, new = PeerAuth([SECRET]), PeerAuth([NEXT, SECRET]), PeerAuth([NEXT])
    check(both, signed(old))
    check(new, signed(both))

    with pytest.raises(UnauthenticatedPeer):
        check(old, signed(both))


@pytest.mark.parametrize(
    "peer", ["127.0.0.1:4000", "127.8.8.8:1", "[::1]:4000", "%5B::1%5D:4000", "[::ffff:127.0.0.1]:1"]
)
def test_without_a_secret_the_own_host_is_believed(peer: str) -> None:
    trust = PeerAuth([])

    assert signed(trust) == ""
    assert not trust.reaches_elsewhere
    trust.check(None, "Forward", b"", peer=peer, now_ms=NOW_MS)


@pytest.mark.parametrize(
    "peer",
    ["192.0.2.1:4000", "[2001:db8::1]:4000", "[::ffff:192.0.2.1]:1", "unix:/run/x", "", "a.localhost:1"],
)
def test_without_a_secret_no_other_host_is(peer: str) -> None:
    with pytest.raises(UnauthenticatedPeer, match="its own host only"):
        PeerAuth([]).check(None, "Forward", b"", peer=peer, now_ms=NOW_MS)


@pytest.mark.parametrize(
    "signature", [None, "", "v1", "v1 1 2", "v1 x 2 3", "v1 ² 2 3", f"v1 {'9' * 16} 2 3"]
)
def test_what_is_no_signature_is_refused(signature: str | None) -> None:
    with pytest.raises(UnauthenticatedPeer, match="not signed"):
        check(PeerAuth([SECRET]), signature)


def test_a_signature_of_another_release_is_refused() -> None:
    with pytest.raises(UnauthenticatedPeer, match="in another way"):
        check(PeerAuth([SECRET]), signed(PeerAuth([SECRET])).replace("v1", "v2"))


@pytest.mark.fuzz
@given(st.text() | st.builds(" ".join, st.lists(st.text() | st.just("v1"), min_size=4, max_size=4)))
def test_no_text_passes_for_a_signature(signature: str) -> None:
    with pytest.raises(UnauthenticatedPeer):
        check(PeerAuth([SECRET]), signature)


def test_calls_in_a_minute_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_auths, "_MAX_NONCES", 1)
    trust = PeerAuth([SECRET])
    check(trust, signed(trust))

    with pytest.raises(UnauthenticatedPeer, match="too many calls"):
        check(trust, trust.sign("Forward", b"body", now_ms=NOW_MS, nonce=bytes([1] * 12)))


def test_what_is_sealed_on_one_end_of_a_stream_is_believed_on_the_other() -> None:
    opening = signed(PeerAuth([SECRET]))
    here, there = PeerAuth([SECRET]).stream_mac(opening), PeerAuth([NEXT, SECRET]).stream_mac(opening)
    for body in (b"one", b"two", b"two", b""):
        there.check(here.seal(body), body)


@pytest.mark.parametrize(
    "forged",
    [
        PeerAuth([NEXT]).stream_mac("opening"),
        PeerAuth([SECRET]).stream_mac("another opening"),
        PeerAuth([]).stream_mac("opening"),
    ],
    ids=["another secret", "another stream", "no seal"],
)
def test_what_is_sealed_otherwise_is_refused(forged: StreamMac) -> None:
    with pytest.raises(UnauthenticatedPeer, match="not sealed"):
        PeerAuth([SECRET]).stream_mac("opening").check(forged.seal(b"body"), b"body")


def test_a_sealed_message_is_good_for_its_body_and_its_place_only() -> None:
    for bodies, sent in [((b"one",), b"two"), ((b"one", b"two"), b"two")]:
        here, there = PeerAuth([SECRET]).stream_mac("opening"), PeerAuth([SECRET]).stream_mac("opening")
        seal = [here.seal(body) for body in bodies][-1]

        with pytest.raises(UnauthenticatedPeer, match="not the next one"):
            there.check(seal, sent)


def test_without_a_secret_nothing_is_sealed() -> None:
    stream_mac = PeerAuth([]).stream_mac("")

    assert stream_mac.seal(b"body") == b""
    stream_mac.check(b"", b"body")


NODES = PeerAuth([SECRET], ["*.nodes.example", "one.example"])


@pytest.mark.parametrize(
    "names", [("one.example",), ("ONE.example",), ("web.example", "a.nodes.example"), ("a.NODES.example",)]
)
def test_a_certificate_with_a_nodes_name_is_known(names: tuple[str, ...]) -> None:
    assert NODES.knows(names)
    assert NODES.reaches_elsewhere


@pytest.mark.parametrize(
    "names",
    [(), ("nodes.example",), (".nodes.example",), ("a.b.nodes.example",), ("*.example",), ("two.example",)],
)
def test_any_other_is_not(names: tuple[str, ...]) -> None:
    assert not NODES.knows(names)


def test_with_names_and_without_a_secret_only_certificates_are_believed() -> None:
    with pytest.raises(UnauthenticatedPeer, match="peer-names"):
        PeerAuth([], ["*.nodes.example"]).check(None, "Forward", b"", peer="127.0.0.1:1", now_ms=NOW_MS)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_a_loopback_address_is_this_host(host: str) -> None:
    assert peer_auths.is_loopback(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "::ffff:192.0.2.1", "localhost.example", ""])
def test_any_other_host_may_be_another_one(host: str) -> None:
    assert not peer_auths.is_loopback(host)
