from __future__ import annotations

import hashlib
import hmac

from mnemosyned.sessions import token_hash
from mnemosyned.sessions.token_hash import AFTER_HASHES, TokenHasher

KEYS = [b"one key", b"another key"]


def test_a_hash_is_the_hmac_of_the_token_and_names_its_key() -> None:
    hasher = TokenHasher(KEYS, is_hashing=True)
    stored_key = hasher.stored_key("tóken")

    assert (
        stored_key
        == "\0" + hasher.key_id + hmac.new(b"one key", "tóken".encode(), hashlib.sha256).hexdigest()
    )
    assert token_hash.is_hashed(stored_key)
    assert hasher.makes(stored_key)
    assert token_hash.key_id_in(stored_key) == hasher.key_id
    assert not token_hash.is_hashed("tóken")


def test_a_session_may_be_stored_under_the_hashes_by_other_keys_and_under_its_token() -> None:
    hasher, other = TokenHasher(KEYS, is_hashing=True), TokenHasher(KEYS[1:], is_hashing=True)

    assert hasher.former_keys("t") == [other.stored_key("t"), "t"]
    assert hasher.key_ids == {hasher.key_id, other.key_id}


def test_without_hashing_the_token_is_the_stored_key_and_the_hmac_keys_are_still_known() -> None:
    idle, hasher = TokenHasher(KEYS, is_hashing=False), TokenHasher(KEYS, is_hashing=True)

    assert idle.stored_key("t") == "t"
    assert idle.former_keys("t") == [hasher.stored_key("t"), hasher.former_keys("t")[0]]
    assert not idle.makes(hasher.stored_key("t"))


def test_only_hashes_by_the_first_key_can_be_of_a_cached_token() -> None:
    hasher, other = TokenHasher(KEYS, is_hashing=True), TokenHasher(KEYS[1:], is_hashing=True)

    assert hasher.makes(hasher.stored_key("t"))
    assert not hasher.makes(other.stored_key("t"))


def test_a_session_id_stands_for_a_hash_and_is_none_itself() -> None:
    stored_key = TokenHasher(KEYS, is_hashing=True).stored_key("t")
    shown = token_hash.session_id(stored_key)

    assert token_hash.is_session_id(shown)
    assert not token_hash.is_hashed(shown)
    assert token_hash.from_session_id(shown) == stored_key
    assert token_hash.session_id("t") == "t"
    assert not token_hash.is_session_id("hmac:t")


def test_hashes_come_before_tokens_and_after_key_is_behind_those_of_a_key() -> None:
    hasher = TokenHasher(KEYS, is_hashing=True)
    of_key = sorted(hasher.stored_key(str(n)).encode() for n in range(100))
    after = token_hash.after_key(hasher.key_id).encode()

    assert of_key[-1] < after < AFTER_HASHES.encode() < b"\x01"
    assert after < f"\0{int(hasher.key_id, 16) + 1:08x}".encode()
