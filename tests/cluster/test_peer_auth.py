from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import peer_auth as peer_auths
from cluster.errors import UnauthenticatedPeer
from cluster.peer_auth import HELLO, NO_KEY, PeerAuth, PeerKey, StreamMac

SECRET, NEXT = b"the-secret-of-today", b"the-secret-of-tomorrow"
NOW_MS = 1_800_000_000_000
PEER = "192.0.2.1:4000"
_numbers = itertools.count(1)


def node(*secrets: bytes, names: tuple[str, ...] = ()) -> PeerAuth:
    """A process of its own."""
    return PeerAuth(secrets, names, process=next(_numbers).to_bytes(16, "big"))


def nonce() -> bytes:
    return next(_numbers).to_bytes(12, "big")


def check(
    callee: PeerAuth,
    signature: str | None,
    *,
    method: str = "Forward",
    body: bytes = b"body",
    names: tuple[str, ...] = (),
    peer: str = PEER,
    now_ms: int = NOW_MS,
) -> PeerKey:
    return callee.check(signature, method, body, certificate_names=names, peer=peer, now_ms=now_ms)


def greeted(caller: PeerAuth, callee: PeerAuth) -> PeerKey:
    """The caller's key, after Hello."""
    greeting = caller.greeting(b"", now_ms=NOW_MS, nonce=nonce())
    proof = callee.proof(greeting, check(callee, greeting, method=HELLO, body=b""))
    return caller.key_for(callee.process, proof, greeting=greeting)


def signed(key: PeerKey, *, method: str = "Forward", body: bytes = b"body", at_ms: int = NOW_MS) -> str:
    return key.sign(method, body, now_ms=at_ms, nonce=nonce())


def test_after_hello_calls_and_answers_are_believed() -> None:
    caller, callee = node(SECRET), node(SECRET)
    key = greeted(caller, callee)
    signature = signed(key)
    seal = check(callee, signature).seal(signature, b"answer")

    key.check_answer(signature, b"answer", seal)


@pytest.mark.parametrize("secret", [NEXT, b""])
def test_without_the_secret_there_is_no_hello(secret: bytes) -> None:
    caller, callee = node(SECRET), node(secret)
    greeting = caller.greeting(b"", now_ms=NOW_MS, nonce=nonce())
    with pytest.raises(UnauthenticatedPeer, match=r"not signed with this cluster's -cluster.secret"):
        check(callee, greeting, method=HELLO, body=b"")

    for forged in (b"", bytes(32), callee.proof(greeting, PeerKey(callee._secrets[0], ""))):
        with pytest.raises(UnauthenticatedPeer, match="does not prove"):
            caller.key_for(callee.process, forged, greeting=greeting)


@pytest.mark.parametrize("changed", ["process", "greeting", "own words"])
def test_a_proof_is_good_for_one_process_and_one_greeting(changed: str) -> None:
    caller, callee, other = node(SECRET), node(SECRET), node(SECRET)
    greeting = caller.greeting(b"", now_ms=NOW_MS, nonce=nonce())
    proof = callee.proof(greeting, check(callee, greeting, method=HELLO, body=b""))
    process = other.process if changed == "process" else callee.process
    if changed == "greeting":
        greeting = caller.greeting(b"", now_ms=NOW_MS, nonce=nonce())
    if changed == "own words":
        proof = bytes.fromhex(greeting.rpartition(" ")[2])

    with pytest.raises(UnauthenticatedPeer):
        caller.key_for(process, proof, greeting=greeting)


def test_a_call_that_was_recorded_is_refused_by_every_other_process() -> None:
    caller, callee, restarted, other = (node(SECRET) for _ in range(4))
    key = greeted(caller, callee)
    signature = signed(key, method="Leave")
    check(callee, signature, method="Leave")

    for process in (restarted, other, callee, caller):
        with pytest.raises(UnauthenticatedPeer):
            check(process, signature, method="Leave")


def test_a_greeting_is_no_call_and_a_call_no_greeting() -> None:
    caller, callee = node(SECRET), node(SECRET)
    greeting = caller.greeting(b"", now_ms=NOW_MS, nonce=nonce())
    call = signed(greeted(caller, callee), method=HELLO, body=b"")

    with pytest.raises(UnauthenticatedPeer):
        check(callee, greeting, method="Leave", body=b"")
    with pytest.raises(UnauthenticatedPeer):
        check(callee, call, method=HELLO, body=b"")


@pytest.mark.parametrize("forger", ["another answer", "another call", "another secret", "no seal", "echo"])
def test_an_answer_is_good_for_its_call_only(forger: str) -> None:
    caller, callee = node(SECRET), node(SECRET)
    key = greeted(caller, callee)
    signature, other = signed(key), signed(key)
    answering = check(callee, signature)
    stranger = greeted(node(NEXT), node(NEXT))
    seal = {
        "another answer": answering.seal(signature, b"other"),
        "another call": answering.seal(other, b"answer"),
        "another secret": stranger.seal(signature, b"answer"),
        "no seal": b"",
        "echo": bytes.fromhex(signature.rpartition(" ")[2]),
    }[forger]

    with pytest.raises(UnauthenticatedPeer, match="not sealed"):
        key.check_answer(signature, b"answer", seal)


@pytest.mark.parametrize("changed", [{"method": "Leave"}, {"body": b"another"}])
def test_a_signature_is_good_for_its_own_method_and_body_only(changed: dict[str, str]) -> None:
    callee = node(SECRET)
    signature = signed(greeted(node(SECRET), callee))
    with pytest.raises(UnauthenticatedPeer, match=r"not signed with this cluster's -cluster.secret"):
        check(callee, signature, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [1, 2, 3, 4])
def test_a_signature_with_another_process_time_nonce_or_code_is_refused(field: int) -> None:
    callee = node(SECRET)
    parts = signed(greeted(node(SECRET), callee)).split(" ")
    parts[field] = str(int(parts[field], 16) + 1).zfill(len(parts[field]))

    with pytest.raises(UnauthenticatedPeer):
        check(callee, " ".join(parts))


def test_no_secret_is_told() -> None:
    with pytest.raises(UnauthenticatedPeer) as caught:
        check(node(SECRET), node(NEXT).greeting(b"", now_ms=NOW_MS, nonce=nonce()), method=HELLO, body=b"")

    assert SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize("off_ms", [-30_001, 30_001])
def test_a_signature_of_another_time_is_refused(off_ms: int) -> None:
    callee = node(SECRET)
    signature = signed(greeted(node(SECRET), callee), at_ms=NOW_MS + off_ms)
    with pytest.raises(UnauthenticatedPeer, match="30 s"):
        check(callee, signature)


@pytest.mark.parametrize("off_ms", [-30_000, 30_000])
def test_clocks_may_differ_by_half_a_minute(off_ms: int) -> None:
    callee = node(SECRET)
    check(callee, signed(greeted(node(SECRET), callee), at_ms=NOW_MS + off_ms))


@pytest.mark.parametrize("later_ms", [0, 29_999, 59_999])
def test_a_call_is_believed_once(later_ms: int) -> None:
    callee = node(SECRET)
    signature = signed(greeted(node(SECRET), callee), at_ms=NOW_MS + 30_000)
    check(callee, signature)

    with pytest.raises(UnauthenticatedPeer, match="made before"):
        check(callee, signature, now_ms=NOW_MS + later_ms)


@pytest.mark.parametrize(("step_ms", "kept"), [(60_001, 20), (-60_001, 20)])
def test_nonces_are_forgotten_when_their_time_stamps_are_too_old_anyway(step_ms: int, kept: int) -> None:
    callee = node(SECRET)
    key = greeted(node(SECRET), callee)
    for minute in range(1, 6):
        now_ms = NOW_MS + minute * step_ms
        for _ in range(10):
            check(callee, signed(key, at_ms=now_ms), now_ms=now_ms)

    assert len(callee._nonces) + len(callee._older_nonces) == kept


def test_two_secrets_are_believed_in_a_rotation_and_the_first_proves() -> None:
    old, both, new = node(SECRET), node(NEXT, SECRET), node(NEXT)
    for caller, callee in ((old, both), (both, new), (new, both), (both, both)):
        key = greeted(caller, callee)
        signature = signed(key)
        key.check_answer(signature, b"x", check(callee, signature).seal(signature, b"x"))

    with pytest.raises(UnauthenticatedPeer):
        greeted(both, old)


def test_keys_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_auths, "_MAX_KEPT_KEYS", 2)
    callee = node(SECRET)
    keys = [greeted(node(SECRET), callee) for _ in range(5)]
    for key in keys + keys:
        check(callee, signed(key))

    assert len(callee._keys) == 2


def test_a_trusted_way_needs_no_proof_and_others_still_do() -> None:
    callee = PeerAuth([SECRET], process=bytes(16), trusted_peer="unix")

    assert check(callee, None, peer="unix") is NO_KEY
    with pytest.raises(UnauthenticatedPeer):
        check(callee, None, peer=PEER)
    with pytest.raises(UnauthenticatedPeer):
        check(node(SECRET), None, peer="unix")


@pytest.mark.parametrize(
    "peer", ["127.0.0.1:4000", "127.8.8.8:1", "[::1]:4000", "%5B::1%5D:4000", "[::ffff:127.0.0.1]:1"]
)
def test_without_a_secret_the_own_host_is_believed(peer: str) -> None:
    callee = node()

    assert not callee.demands_proof
    assert check(callee, None, peer=peer) is NO_KEY
    assert NO_KEY.sign("Forward", b"", now_ms=NOW_MS, nonce=nonce()) == ""
    assert NO_KEY.seal("", b"answer") == b""


@pytest.mark.parametrize(
    "peer",
    ["192.0.2.1:4000", "[2001:db8::1]:4000", "[::ffff:192.0.2.1]:1", "unix:/run/x", "", "a.localhost:1"],
)
def test_without_a_secret_no_other_host_is(peer: str) -> None:
    with pytest.raises(UnauthenticatedPeer, match="its own host only"):
        check(node(), None, peer=peer)


@pytest.mark.parametrize(
    ("secrets", "names", "certificate", "host", "word"),
    [
        ((), (), (), "127.0.0.1", ""),
        ((), (), (), "192.0.2.1", "its own host only"),
        ((SECRET,), (), (), "127.0.0.1", "does not prove"),
        ((), ("one.example",), ("two.example",), "127.0.0.1", "peer-names"),
        ((), ("one.example",), ("one.example",), "192.0.2.1", ""),
        ((SECRET,), ("one.example",), ("one.example",), "192.0.2.1", ""),
        ((SECRET,), ("one.example",), (), "127.0.0.1", "does not prove"),
    ],
)
def test_a_callee_without_a_proof_needs_a_certificate_or_this_host(
    secrets: tuple[bytes, ...], names: tuple[str, ...], certificate: tuple[str, ...], host: str, word: str
) -> None:
    objection = node(*secrets, names=names).objection_to_callee(certificate, host)

    assert (word in objection) if word else not objection


def test_a_nodes_certificate_is_enough_for_a_caller_and_its_own_secret_does_no_harm() -> None:
    callee = node(SECRET, names=("one.example",))
    assert check(callee, None, names=("one.example",)) is NO_KEY
    greeting = node(NEXT).greeting(b"", now_ms=NOW_MS, nonce=nonce())
    assert check(callee, greeting, method=HELLO, body=b"", names=("one.example",)) is NO_KEY
    assert callee.proof(greeting, NO_KEY) == b""
    key = greeted(node(SECRET), callee)

    assert check(callee, signed(key), names=("one.example",)) is not NO_KEY


@pytest.mark.parametrize(
    "signature", [None, "", "v2", "v2 1 2 3", "v2 p x 2 3", "v2 p ² 2 3", f"v2 p {'9' * 16} 2 3"]
)
def test_what_is_no_signature_is_refused(signature: str | None) -> None:
    with pytest.raises(UnauthenticatedPeer, match="not signed"):
        check(node(SECRET), signature)


def test_a_signature_of_another_release_is_refused() -> None:
    with pytest.raises(UnauthenticatedPeer, match="in another way"):
        check(node(SECRET), "v3 p 1 2 3")


@pytest.mark.fuzz
@given(st.text() | st.builds(" ".join, st.lists(st.text() | st.just("v2"), min_size=5, max_size=5)))
def test_no_text_passes_for_a_signature(signature: str) -> None:
    with pytest.raises(UnauthenticatedPeer):
        check(node(SECRET), signature)


def test_calls_in_a_minute_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    callee = node(SECRET)
    key = greeted(node(SECRET), callee)
    monkeypatch.setattr(peer_auths, "_MAX_NONCES", 2)
    check(callee, signed(key))

    with pytest.raises(UnauthenticatedPeer, match="too many calls"):
        check(callee, signed(key))


def streams(secret: bytes = SECRET) -> tuple[tuple[StreamMac, StreamMac], tuple[StreamMac, StreamMac]]:
    """The caller's and the callee's seals of one stream."""
    callee = node(secret)
    key = greeted(node(secret), callee)
    opening = signed(key, body=b"")
    return key.stream_macs(opening), check(callee, opening, body=b"").stream_macs(opening)


def test_what_is_sealed_on_one_end_of_a_stream_is_believed_on_the_other() -> None:
    (batches, answers), (their_batches, their_answers) = streams()
    for body in (b"one", b"two", b"two", b""):
        their_batches.check(batches.seal(body), body)
        answers.check(their_answers.seal(body), body)


def test_an_answer_on_a_stream_is_no_batch() -> None:
    (batches, answers), _ = streams()
    with pytest.raises(UnauthenticatedPeer, match="not sealed"):
        answers.check(batches.seal(b"body"), b"body")


@pytest.mark.parametrize("forger", ["another secret", "another stream", "no seal"])
def test_what_is_sealed_otherwise_is_refused(forger: str) -> None:
    _, (batches, _) = streams()
    forged = {
        "another secret": streams(NEXT)[0][0],
        "another stream": streams()[0][0],
        "no seal": StreamMac(None),
    }[forger]
    with pytest.raises(UnauthenticatedPeer, match="not sealed"):
        batches.check(forged.seal(b"body"), b"body")


def test_a_sealed_message_is_good_for_its_body_and_its_place_only() -> None:
    for bodies, sent in [((b"one",), b"two"), ((b"one", b"two"), b"two")]:
        (here, _), (there, _) = streams()
        seal = [here.seal(body) for body in bodies][-1]

        with pytest.raises(UnauthenticatedPeer, match="not the next one"):
            there.check(seal, sent)


def test_without_a_secret_nothing_is_sealed() -> None:
    stream_mac, _ = NO_KEY.stream_macs("")

    assert stream_mac.seal(b"body") == b""
    stream_mac.check(b"", b"body")


NODES = node(SECRET, names=("*.nodes.example", "one.example"))


@pytest.mark.parametrize(
    "names", [("one.example",), ("ONE.example",), ("web.example", "a.nodes.example"), ("a.NODES.example",)]
)
def test_a_certificate_with_a_nodes_name_is_known(names: tuple[str, ...]) -> None:
    assert NODES.knows(names)
    assert NODES.demands_proof


@pytest.mark.parametrize(
    "names",
    [(), ("nodes.example",), (".nodes.example",), ("a.b.nodes.example",), ("*.example",), ("two.example",)],
)
def test_any_other_is_not(names: tuple[str, ...]) -> None:
    assert not NODES.knows(names)


def test_with_names_and_without_a_secret_only_certificates_are_believed() -> None:
    with pytest.raises(UnauthenticatedPeer, match="peer-names"):
        check(node(names=("*.nodes.example",)), None, peer="127.0.0.1:1")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_a_loopback_address_is_this_host(host: str) -> None:
    assert peer_auths.is_loopback(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "::ffff:192.0.2.1", "localhost.example", ""])
def test_any_other_host_may_be_another_one(host: str) -> None:
    assert not peer_auths.is_loopback(host)


def test_secrets_are_renewed_without_refusing_calls_on_connections_of_either_secret() -> None:
    caller, callee = node(SECRET), node(SECRET)
    old_key = greeted(caller, callee)
    check(callee, signed(old_key))

    for one in (caller, callee):
        one.renew([NEXT, SECRET])
    new_key = greeted(caller, callee)
    for key in (old_key, new_key, old_key, new_key):
        check(callee, signed(key))

    callee.renew([NEXT])
    check(callee, signed(new_key))
    with pytest.raises(UnauthenticatedPeer):
        check(callee, signed(old_key))


@pytest.mark.parametrize(("before", "after"), [((SECRET,), ()), ((), (SECRET,))])
def test_secrets_are_neither_begun_nor_given_up_while_a_node_runs(
    before: tuple[bytes, ...], after: tuple[bytes, ...]
) -> None:
    one = node(*before)

    with pytest.raises(ValueError, match="secret"):
        one.renew(after)
    assert one.has_secret == bool(before)
