from __future__ import annotations

import hashlib
import hmac

from mnemosyned.sessions import token_hash as names
from mnemosyned.sessions.token_hash import AFTER_HASHED, TokenHasher

KEYS = [b"one key", b"another key"]


def test_a_protected_name_is_the_hmac_of_the_token_and_tells_its_key() -> None:
    known = TokenHasher(KEYS, are_protected=True)
    name = known.alias("tóken")

    assert name == "\0" + known.key_id + hmac.new(b"one key", "tóken".encode(), hashlib.sha256).hexdigest()
    assert names.is_hashed(name)
    assert known.is_stored_key(name)
    assert names.key_id_in(name) == known.key_id
    assert not names.is_hashed("tóken")


def test_a_token_may_have_the_names_by_other_keys_and_its_own() -> None:
    known, other = TokenHasher(KEYS, are_protected=True), TokenHasher(KEYS[1:], are_protected=True)

    assert known.others("t") == [other.alias("t"), "t"]
    assert known.key_ids == {known.key_id, other.key_id}


def test_without_protection_the_token_is_the_name_and_the_keys_are_still_known() -> None:
    ready, known = TokenHasher(KEYS, are_protected=False), TokenHasher(KEYS, are_protected=True)

    assert ready.alias("t") == "t"
    assert ready.others("t") == [known.alias("t"), known.others("t")[0]]
    assert not ready.knows(known.alias("t"))


def test_only_names_by_the_first_key_are_known_to_be_of_a_cached_token() -> None:
    known, other = TokenHasher(KEYS, are_protected=True), TokenHasher(KEYS[1:], are_protected=True)

    assert known.knows(known.alias("t"))
    assert not known.knows(other.alias("t"))


def test_what_is_shown_of_a_name_names_it_and_is_no_name() -> None:
    name = TokenHasher(KEYS, are_protected=True).alias("t")
    handle = names.shown(name)

    assert names.is_session_id(handle)
    assert not names.is_hashed(handle)
    assert names.from_session_id(handle) == name
    assert names.shown("t") == "t"
    assert not names.is_session_id("hmac:t")


def test_protected_names_come_before_tokens_and_after_key_is_behind_those_of_a_key() -> None:
    known = TokenHasher(KEYS, are_protected=True)
    of_key = sorted(known.alias(str(n)).encode() for n in range(100))
    after = names.after_key(known.key_id).encode()

    assert of_key[-1] < after < AFTER_HASHED.encode() < b"\x01"
    assert after < f"\0{int(known.key_id, 16) + 1:08x}".encode()
