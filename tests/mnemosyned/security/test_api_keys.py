from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mnemosyned.security.api_keys import MIN_KEY_LENGTH, Callers, Role, digest_of, line_of, new_key, read
from mnemosyned.security.file_reloader import FilesUnusable

KEY, OTHER = "a-key-that-the-web-shop-has-been-given", "a-key-that-the-operators-have-been-given"


def callers(tmp_path: Path, *lines: str) -> Callers:
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return read(str(path))


def test_a_key_has_the_role_of_its_line(tmp_path: Path) -> None:
    found = callers(
        tmp_path, "# the shop", line_of(KEY, Role.SESSION) + "  # web", "", line_of(OTHER, Role.ADMIN)
    )

    assert found.role_of(KEY, ()) is Role.SESSION
    assert found.role_of(OTHER, ()) is Role.ADMIN
    for unknown in (new_key(), "", "é", KEY + " ", digest_of(KEY).hex()):
        assert found.role_of(unknown, ()) is None


def test_without_a_key_the_greatest_role_of_the_certificates_names_counts(tmp_path: Path) -> None:
    found = callers(
        tmp_path, "readonly name:*.example", "admin name:ops.example", line_of(KEY, Role.READONLY)
    )

    assert found.role_of(None, ("web.example",)) is Role.READONLY
    assert found.role_of(None, ("web.example", "ops.example")) is Role.ADMIN
    assert found.role_of(None, ("a.b.example",)) is None
    assert found.role_of(None, ()) is None
    # A key that is sent is what counts, good or not.
    assert found.role_of(KEY, ("ops.example",)) is Role.READONLY
    assert found.role_of("unknown", ("ops.example",)) is None


def test_the_file_keeps_a_hash_that_others_can_make() -> None:
    assert line_of(KEY, Role.ADMIN) == f"admin sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"
    assert len(KEY) >= MIN_KEY_LENGTH
    assert new_key() != new_key()


@pytest.mark.parametrize(
    "line",
    [
        "root sha256:" + "0" * 64,
        "session sha256:0",
        f"session {KEY}",
        "session",
        "session name:",
        "admin x y",
    ],
)
def test_a_line_that_means_nothing_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(FilesUnusable, match="line 2: it is not a role") as caught:
        callers(tmp_path, line_of(OTHER, Role.ADMIN), line)

    assert KEY not in str(caught.value)


def test_a_file_without_callers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FilesUnusable, match="no callers"):
        callers(tmp_path, "# nobody yet")
    with pytest.raises(FilesUnusable, match="No such file"):
        read(str(tmp_path / "absent"))
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(FilesUnusable, match="not UTF-8"):
        read(str(tmp_path / "keys"))


def test_roles_contain_one_another() -> None:
    assert Role.READONLY < Role.SESSION < Role.ADMIN
